#!/usr/bin/env bash
# Register the public key of a site under its name, in nginx and at the SuperLink.
# Usage: register.sh FOLDER SITE KEY      FOLDER: the folder of nginx.conf; KEY: the .pub file of the site
# Needs flwr in PATH, and a connection named coordinator in $FLWR_HOME/config.toml.
set -euo pipefail
umask 077
folder=$1 site=$2 key=$3
mkdir -p "$folder/hospitals"
# The form in which a SuperNode sends its key.
pem=$(ssh-keygen -e -m PKCS8 -f "$key" | base64 | tr -d '\n')
printf '"%s" "%s";\n' "$pem" "$site" > "$folder/hospitals/$site.map"
# nginx runs: it reads its settings again.
if [[ -f $folder/nginx.pid ]]; then PATH=$PATH:/usr/sbin nginx -e stderr -p "$folder" -c nginx.conf -s reload; fi
flwr supernode register "$key" coordinator --name "$site"
