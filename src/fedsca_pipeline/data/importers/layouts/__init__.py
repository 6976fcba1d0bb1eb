"""Published layouts, one file each. The file name is the value of ``importer=``."""
