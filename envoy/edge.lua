-- Runs before and after the transcoder: filters the caller's headers, sets the request id, and sets the HTTP status and
-- the body of an error.

local function is_grpc(headers)
  return (headers:get("content-type") or ""):sub(1, 16) == "application/grpc"
end

-- An HTTP caller's gRPC headers must not reach the gate: the gate would take them for the transcoder's.
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
  -- Accept one printable word of at most 128 bytes, like the gate; otherwise use the edge's own id.
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
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set("atserving", "reqid", reqid)
  metadata:set("atserving", "native", native)
end

-- The gate sends the metadata of a reply as trailers, so that a reply leaves the gate in one piece and never breaks off
-- after its headers. The transcoder buffers the reply until the trailers arrive in any case.
local from_trailers = { "x-serving-status", "x-serving-version", "retry-after" }

local internal = {
  "x-serving-status",
  "grpc-status",
  "grpc-message",
  "grpc-accept-encoding",
  "grpc-encoding",
  "x-envoy-upstream-healthchecked-cluster",
}

local function read_trailers(handle)
  handle:body() -- waits for the whole response; header objects from before this call become invalid
  local headers, trailers = handle:headers(), handle:trailers()
  if trailers == nil then
    return
  end
  for _, name in ipairs(from_trailers) do
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

-- A gRPC status other than OK comes from the gate's gRPC server: the call failed before the gate decided anything. Its
-- message is for developers, and the gate's log has it.
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
  local metadata = handle:streamInfo():dynamicMetadata():get("atserving")
  local reqid, native = nil, false
  if metadata ~= nil then
    reqid, native = metadata["reqid"], metadata["native"]
  end
  if not native then -- a native gRPC caller reads the status and the trailers itself
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
