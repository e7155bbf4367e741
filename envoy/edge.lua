-- Around the transcoder: what a caller may say in headers, the request's id, and the HTTP status and body of an error.

local function is_grpc(headers)
  return (headers:get("content-type") or ""):sub(1, 16) == "application/grpc"
end

-- Headers that mean something to gRPC mean nothing in a request that comes as HTTP, and must not reach the gate as if
-- the transcoder had written them.
local function remove_grpc_headers(headers)
  local found = {}
  for name, _ in pairs(headers) do
    if name:sub(1, 5) == "grpc-" or name:sub(-4) == "-bin" then
      table.insert(found, name)
    end
  end
  for _, name in ipairs(found) do
    headers:remove(name)
  end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local native = is_grpc(headers)
  local reqid = headers:get("x-reqid")
  -- One printable word of at most 128 bytes, or the edge's own id: the gate's rule too.
  if reqid == nil or #reqid == 0 or #reqid > 128 or reqid:find("[^\33-\126]") then
    reqid = headers:get("x-request-id")
    headers:replace("x-reqid", reqid)
  end
  local trace = headers:get("traceparent")
  if trace ~= nil and (#trace ~= 55 or trace:find("[^0-9a-f-]")) then
    headers:remove("traceparent")
  end
  if not native then
    remove_grpc_headers(headers)
  end
  local noted = handle:streamInfo():dynamicMetadata()
  noted:set("atserving", "reqid", reqid)
  noted:set("atserving", "native", native)
end

local internal = {
  "x-serving-status",
  "grpc-status",
  "grpc-message",
  "grpc-accept-encoding",
  "grpc-encoding",
  "x-envoy-upstream-healthchecked-cluster",
}

-- A gRPC status of the gate's own server means that the call itself failed, not that the gate answered so. What it says
-- is for its developers, and is in its log.
local function write_failure(handle, headers)
  local status = headers:get(":status")
  if status == "200" then
    status = "500"
    headers:replace(":status", status)
  end
  handle:body(true):setBytes('{"code":' .. status .. ',"message":"the gate failed on this request"}')
  headers:replace("content-type", "application/json")
end

function envoy_on_response(handle)
  local headers = handle:headers()
  local noted = handle:streamInfo():dynamicMetadata():get("atserving")
  if noted ~= nil then
    headers:replace("x-reqid", noted["reqid"])
    if noted["native"] then
      return -- a gRPC caller reads its status itself
    end
  end
  local failed = headers:get("grpc-status")
  if headers:get("x-serving-status") ~= nil then
    headers:replace(":status", headers:get("x-serving-status"))
  elseif failed ~= nil and failed ~= "0" then
    write_failure(handle, headers)
  end
  for _, name in ipairs(internal) do
    headers:remove(name)
  end
end
