"""The API of operators (proto/atserving/admin/v1/admin.proto)."""
