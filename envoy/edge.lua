-- Before and after the transcoder: the request's id, and the HTTP status and body of an error.

function envoy_on_request(handle)
  local headers = handle:headers()
  local reqid = headers:get("x-reqid")
  -- One printable word of at most 128 bytes, or the edge's own id: the gate's rule too.
  if reqid == nil or #reqid == 0 or #reqid > 128 or reqid:find("[^\33-\126]") then
    reqid = headers:get("x-request-id")
    headers:replace("x-reqid", reqid)
  end
  handle:streamInfo():dynamicMetadata():set("atserving", "reqid", reqid)
end

local internal = {
  "x-serving-status",
  "grpc-status",
  "grpc-message",
  "grpc-accept-encoding",
  "grpc-encoding",
  "x-envoy-upstream-healthchecked-cluster",
}

local function json_string(text)
  -- grpc-message is percent-encoded UTF-8.
  local decoded = text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end)
  local escaped = decoded:gsub('[%c"\\]', function(c) return string.format("\\u%04x", c:byte()) end)
  return '"' .. escaped .. '"'
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local known = handle:streamInfo():dynamicMetadata():get("atserving")
  if known ~= nil then
    headers:replace("x-reqid", known["reqid"])
  end
  local content_type = headers:get("content-type") or ""
  if content_type:sub(1, 16) == "application/grpc" then
    return -- a native gRPC caller reads its status itself
  end
  -- The gate says the status of what it answered; a gRPC status of its own means that the call itself failed.
  local status = headers:get("x-serving-status")
  local failed = headers:get("grpc-status")
  if status ~= nil then
    headers:replace(":status", status)
  elseif failed ~= nil and failed ~= "0" then
    local body = '{"code":' .. headers:get(":status") .. ',"message":' .. json_string(headers:get("grpc-message") or "") .. "}"
    handle:body(true):setBytes(body)
    headers:replace("content-type", "application/json")
  end
  for _, name in ipairs(internal) do
    headers:remove(name)
  end
end
