-- Takes up to n places in every scope at once, or in none: a sliding window of one minute.
--
-- KEYS  one hash per scope, all of one organization (one hash tag, so one slot of a cluster)
-- ARGV  n, then each scope's limit in KEYS' order
-- Answers {granted, now, then for each scope: limit, places left, when the next place frees}; times in Unix ms.
--
-- A place is held for at least 60 s. Places are counted in cells of one second of the wall clock; a cell remembers the
-- time of its last request and leaves 60 s after that, so a place frees up to a second late and never early. At most 61
-- cells live at a time, so second % 61 names a cell. A scope's fields, 126 at most, which a listpack still holds:
--   held          places held
--   first, newest seconds of its oldest and its newest cell
--   last          time of its last granted request
--   c<i>, t<i>    a cell's places, and the time of its last request

local WINDOW, CELLS = 60000, 61
local key_count = #KEYS

local function read_clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function read_cell(key, second)
  local index = second % CELLS
  local cell = redis.call('HMGET', key, 'c' .. index, 't' .. index)
  return tonumber(cell[1]), tonumber(cell[2])
end

-- Reads the scopes. A clock that went back by at most a window stands still; a scope further ahead starts anew.
local function read_scopes(now)
  local scopes = {}
  for k = 1, key_count do
    local fields = redis.call('HMGET', KEYS[k], 'held', 'first', 'newest', 'last')
    local scope = {
      key = KEYS[k], limit = tonumber(ARGV[k + 1]), held = tonumber(fields[1]) or 0,
      first = tonumber(fields[2]), newest = tonumber(fields[3]),
    }
    local last = tonumber(fields[4]) or 0
    if last - now > WINDOW then
      redis.call('DEL', scope.key)
      scope.held, scope.first, scope.newest = 0, nil, nil
    elseif last > now then
      now = last
    end
    scopes[k] = scope
  end
  return scopes, now
end

-- Drops the cells that have left, and writes that down at once: another scope may refuse, and then nothing else is
-- written. Leaves the first living cell's places and leaving time in the scope.
local function expire(scope, now)
  local gone = {}
  while scope.held > 0 and scope.first <= scope.newest do
    local places, time = read_cell(scope.key, scope.first)
    if places then
      if time + WINDOW > now then
        scope.first_places, scope.next_free = places, time + WINDOW
        break
      end
      scope.held = scope.held - places
      gone[#gone + 1] = 'c' .. scope.first % CELLS
      gone[#gone + 1] = 't' .. scope.first % CELLS
    end
    scope.first = scope.first + 1
  end
  if #gone == 0 then return end
  if scope.held == 0 then
    redis.call('DEL', scope.key)
    scope.first = nil
  else
    redis.call('HDEL', scope.key, unpack(gone))
    redis.call('HSET', scope.key, 'first', scope.first, 'held', scope.held)
  end
end

local function take(scope, places, now)
  local second = math.floor(now / 1000)
  local index = second % CELLS
  local first = scope.first or second
  scope.held = scope.held + places
  if first == second then scope.next_free = now + WINDOW end
  redis.call('HINCRBY', scope.key, 'c' .. index, places)
  redis.call('HSET', scope.key, 't' .. index, now, 'first', first, 'newest', second, 'held', scope.held, 'last', now)
  redis.call('PEXPIRE', scope.key, WINDOW + 1000)
end

-- When the held places fall below the limit: the first cell's leaving, or a later one's after the limit was lowered.
local function find_next_free(scope, now)
  if not scope.next_free then return now end
  local free, second = scope.next_free, scope.first
  local left = scope.held - (scope.first_places or 0)
  while scope.held > scope.limit and left >= scope.limit and second < scope.newest do
    second = second + 1
    local places, time = read_cell(scope.key, second)
    if places then left, free = left - places, time + WINDOW end
  end
  return free
end

local scopes, now = read_scopes(read_clock())
local granted = tonumber(ARGV[1])
for _, scope in ipairs(scopes) do
  expire(scope, now)
  granted = math.max(0, math.min(granted, scope.limit - scope.held))
end
local answer = {granted, now}
for _, scope in ipairs(scopes) do
  if granted > 0 then take(scope, granted, now) end
  answer[#answer + 1] = scope.limit
  answer[#answer + 1] = math.max(0, scope.limit - scope.held)
  answer[#answer + 1] = find_next_free(scope, now)
end
return answer
