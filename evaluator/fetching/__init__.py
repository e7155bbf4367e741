"""Downloads what requests and releases name, and unpacks releases. Runs in the front process."""
