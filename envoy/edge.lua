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

-- What the gate says beside a reply comes in its trailers: so all of an answer leaves the gate at once, and one that was
-- begun and broke off can't happen. The transcoder holds the reply until its trailers are there in any case.
local said = { "x-serving-status", "x-serving-version", "retry-after" }

local internal = {
  "x-serving-status",
  "grpc-status",
  "grpc-message",
  "grpc-accept-encoding",
  "grpc-encoding",
  "x-envoy-upstream-healthchecked-cluster",
}

local function read_trailers(handle)
  handle:body() -- waits for the whole answer; what was fetched of it before is no longer valid
  local headers, trailers = handle:headers(), handle:trailers()
  if trailers == nil then
    return
  end
  for _, name in ipairs(said) do
    local value = trailers:get(name)
    if value ~= nil then
      headers:replace(name, value)
    end
  end
  local found = {}
  for name, _ in pairs(trailers) do
    table.insert(found, name)
  end
  for _, name in ipairs(found) do
    trailers:remove(name)
  end
end

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
  local noted = handle:streamInfo():dynamicMetadata():get("atserving")
  local reqid, native = nil, false
  if noted ~= nil then
    reqid, native = noted["reqid"], noted["native"]
  end
  if not native then -- a gRPC caller reads status and trailers itself
    read_trailers(handle)
  end
  local headers = handle:headers()
  if reqid ~= nil then
    headers:replace("x-reqid", reqid)
  end
  if native then
    return
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
