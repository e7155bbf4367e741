"""Downloads the resources of requests and the files of releases, and unpacks releases. Runs in the front process."""
