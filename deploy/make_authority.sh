#!/usr/bin/env bash
# Make a test authority, the server certificate of the coordinator, one key pair per site, and the SuperExec secret.
# Usage: make_authority.sh FOLDER HOST SITE...      HOST: name or address under which the sites reach the coordinator
# For trials only. In a real federation the server certificate comes from a real authority, and each site makes its key
# (the ssh-keygen line below) and sends only the .pub file.
set -euo pipefail
umask 077
folder=$1 host=$2
shift 2
mkdir -p "$folder"
cd "$folder"

openssl ecparam -name secp384r1 -genkey -noout -out ca.key
openssl req -new -x509 -key ca.key -sha384 -days 365 -subj "/CN=fedsca test authority" -out ca.crt 2>/dev/null

openssl ecparam -name secp384r1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out server.key
openssl req -new -key server.key -subj "/CN=$host" -out server.csr 2>/dev/null
if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then name=IP:$host; else name=DNS:$host; fi
printf 'subjectAltName=%s,DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n' "$name" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -sha384 -days 365 -extfile server.ext \
    -out server.pem 2>/dev/null
rm server.csr server.ext

head -c 48 /dev/urandom > superexec.secret
for site in "$@"; do
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "$site" -f "$site.key" <<< y > /dev/null
    mv "$site.key.pub" "$site.pub"
    chmod 644 "$site.pub"
done
chmod 644 ca.crt server.pem
