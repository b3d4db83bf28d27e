"""What runs inside Redis. Each script is atomic: a limit holds with any number of writers.

Scripts rather than functions: they need no load step after a flush or failover, and no rights to
change a server's libraries. They need Redis 7.0, which lets a script that frees memory before it
takes some run on a full server (``allow-oom``).

A namespace's hash of states holds

- ``s:<state>``: the state's bytes (:mod:`cache.codec`)
- ``m:<state>``: ``charge|uses|kind|log_snr``
- ``e:<entry>``: ``charge|group|`` and the embedding in half precision
- ``n:<entry>``: how many of its states are left
- ``c:<entry>``: claims, each followed by a comma; only entries of ``NOISY`` states have it
- ``floor``: highest score evicted so far

and its log has the fields ``a`` (an entry was added; ``s`` lists its states as
``id|kind|log_snr``), ``x`` (states are gone), ``c`` (``entry claim``), ``f`` (everything is gone).
"""

from __future__ import annotations

from cache.accounting import MAX_CLAIMS

LOG_TTL_S = 24 * 3600
"""What a log has to live that is made anew by other than an offer, which knows the cache's own."""

_COMMON = (
    f"#!lua flags=allow-oom\nlocal LOG_TTL_S = {LOG_TTL_S}"
    + """
local states, scores, size, log = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local function entry_of(state) return string.match(state, '^(.*)%.[^.]*$') end

-- Whoever notes in a log that had gone makes it anew: no key may stay for ever.
local function note(limit, ...)
  redis.call('XADD', log, 'MAXLEN', '=', limit, '*', ...)
  if redis.call('TTL', log) < 0 then redis.call('EXPIRE', log, LOG_TTL_S) end
end

-- Forgets a state, and its entry with the last one; returns the bytes given back.
local function forget(state)
  local freed = tonumber(string.match(redis.call('HGET', states, 'm:' .. state) or '0', '^%d+'))
  local entry = entry_of(state)
  redis.call('ZREM', scores, state)
  redis.call('HDEL', states, 's:' .. state, 'm:' .. state)
  if redis.call('HINCRBY', states, 'n:' .. entry, -1) <= 0 then
    local record = redis.call('HGET', states, 'e:' .. entry) or '0|'
    freed = freed + tonumber(string.match(record, '^%d+'))
    redis.call('HDEL', states, 'e:' .. entry, 'n:' .. entry, 'c:' .. entry)
  end
  redis.call('INCRBY', size, -freed)
  return freed
end

local function now_of(given)
  if given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local LOG2 = math.log(2)

-- The policies of cache/policy.py. `score` is nil for a new state.
local function scored(policy, half_life, score, uses, saved, bytes, now)
  if policy == 'fifo' then return score or now end
  if policy == 'lru' then return now end
  if policy == 'lfu' then return uses end
  if policy == 'lcbfu-published' then return score and score + saved or 0 end
  if policy == 'gdsf' then
    local floor = tonumber(redis.call('HGET', states, 'floor') or '0')
    return floor + (uses + 1) * saved / bytes
  end
  local gained = math.log(math.max(saved, 1) / bytes) / LOG2 + now / half_life
  if not score then return gained end
  local high, low = math.max(score, gained), math.min(score, gained)
  return high + math.log(1 + 2 ^ (low - high)) / LOG2
end

local function set_score(state, score)
  redis.call('ZADD', scores, string.format('%.17g', score), state)
end

local function keep_alive(ttl)
  for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ttl) end
end
"""
)

FETCH = (
    _COMMON
    + f"local MAX_CLAIMS = {MAX_CLAIMS}"
    + """
-- ARGV: policy, half-life, now, ttl, log limit, claim, then pairs of state and steps saved.
-- Returns the first state that is there and free for the claim, and its bytes.
local policy, half_life, now = ARGV[1], tonumber(ARGV[2]), now_of(ARGV[3])
local claim = ARGV[6]

local function free_for_claim(state)
  local entry = entry_of(state)
  local claims = redis.call('HGET', states, 'c:' .. entry)
  if not claims then return true end
  local _, count = string.gsub(claims, ',', '')
  if count >= MAX_CLAIMS or string.find(claims, claim .. ',', 1, true) then return false end
  redis.call('HSET', states, 'c:' .. entry, claims .. claim .. ',')
  note(ARGV[5], 'c', entry .. ' ' .. claim)
  return true
end

for i = 7, #ARGV, 2 do
  local state, saved = ARGV[i], tonumber(ARGV[i + 1])
  local payload = redis.call('HGET', states, 's:' .. state)
  local meta = redis.call('HGET', states, 'm:' .. state)
  if payload and meta and free_for_claim(state) then
    local bytes, uses, rest = string.match(meta, '^(%d+)|(%d+)|(.*)$')
    redis.call('HSET', states, 'm:' .. state, bytes .. '|' .. (uses + 1) .. '|' .. rest)
    local score = tonumber(redis.call('ZSCORE', scores, state))
    set_score(state, scored(policy, half_life, score, uses + 1, saved, tonumber(bytes), now))
    keep_alive(ARGV[4])
    return {state, payload}
  end
end
return false
"""
)

OFFER = (
    _COMMON
    + """
-- ARGV: policy, half-life, now, ttl, log limit, limit, entry, record, entry charge, claim, then for
-- each state: id, steps saved, charge, kind|log_snr, bytes.
-- Returns what became of it ('stored', 'duplicate', 'large', 'full') and how many were evicted.
local policy, half_life, now = ARGV[1], tonumber(ARGV[2]), now_of(ARGV[3])
local limit, entry, record, claim = tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[10]

-- A server that evicts by itself may have taken one of the keys: what is left is of no use.
local whole = redis.call('EXISTS', states, scores, size)
if whole ~= 3 and (whole ~= 0) then
  redis.call('DEL', states, scores, size)
  note(ARGV[5], 'f', '1')
end

if redis.call('HEXISTS', states, 'e:' .. entry) == 1 then return {'duplicate', 0} end
local needed = tonumber(ARGV[9])
for i = 11, #ARGV, 5 do needed = needed + tonumber(ARGV[i + 2]) end
if needed > limit then return {'large', 0} end

-- On a server that is full for others too, this namespace may not grow: it pays with its own.
local must_free = 0
local memory = redis.pcall('INFO', 'memory')
if type(memory) == 'string' then
  local used = tonumber(string.match(memory, 'used_memory:(%d+)'))
  local maximum = tonumber(string.match(memory, 'maxmemory:(%d+)'))
  if maximum > 0 and used + needed > maximum then must_free = needed end
end

local held, freed, gone = tonumber(redis.call('GET', size) or '0'), 0, {}
if must_free > held then return {'full', 0} end
local floor = tonumber(redis.call('HGET', states, 'floor') or '0')
while held - freed + needed > limit or freed < must_free do
  local lowest = redis.call('ZRANGE', scores, 0, 0, 'WITHSCORES')
  if #lowest == 0 then break end
  floor = math.max(floor, tonumber(lowest[2]))
  freed = freed + forget(lowest[1])
  gone[#gone + 1] = lowest[1]
end
if #gone > 0 then
  redis.call('HSET', states, 'floor', string.format('%.17g', floor))
  note(ARGV[5], 'x', table.concat(gone, ' '))
end

local listed = {}
for i = 11, #ARGV, 5 do
  local id, saved, bytes = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  redis.call('HSET', states, 's:' .. id, ARGV[i + 4])
  redis.call('HSET', states, 'm:' .. id, ARGV[i + 2] .. '|0|' .. ARGV[i + 3])
  set_score(id, scored(policy, half_life, nil, 0, saved, bytes, now))
  listed[#listed + 1] = id .. '|' .. ARGV[i + 3]
end
redis.call('HSET', states, 'e:' .. entry, record)
redis.call('HSET', states, 'n:' .. entry, #listed)
if claim ~= '' then redis.call('HSET', states, 'c:' .. entry, claim .. ',') end
redis.call('INCRBY', size, needed)
note(ARGV[5], 'a', entry, 's', table.concat(listed, ' '))
keep_alive(ARGV[4])
return {'stored', #gone}
"""
)

DROP = (
    _COMMON
    + """
-- ARGV: log limit, state. Forgets one state (a damaged one).
if redis.call('HEXISTS', states, 'm:' .. ARGV[2]) == 0 then return 0 end
forget(ARGV[2])
note(ARGV[1], 'x', ARGV[2])
return 1
"""
)

CLEAR = (
    _COMMON
    + """
-- ARGV: log limit. Forgets the namespace, and tells every index.
-- Returns how many entries, states and charged bytes there were. Clearing is also the remedy for
-- keys that hold something else: those count as nothing, and go.
if redis.call('EXISTS', states, scores, size, log) == 0 then return {0, 0, 0} end
local seen, entries = {}, 0
local held = redis.pcall('ZRANGE', scores, 0, -1)
if held.err then held = {} end
for _, state in ipairs(held) do
  local entry = entry_of(state) or state
  if not seen[entry] then seen[entry], entries = true, entries + 1 end
end
local counted = redis.pcall('GET', size)
local bytes = type(counted) == 'string' and tonumber(counted) or 0
redis.call('UNLINK', states, scores, size) -- the hash is large, and clients wait meanwhile
if redis.call('TYPE', log).ok ~= 'stream' then redis.call('UNLINK', log) end
note(ARGV[1], 'f', '1')
return {entries, #held, bytes}
"""
)
