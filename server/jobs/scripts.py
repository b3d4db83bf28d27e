"""What Redis does in one piece for jobs. Keys are the caller's: no script makes one up.

Every script may run twice and do what one run does: clients repeat a call whose answer was lost.
"""

from __future__ import annotations

# KEYS job, key, unfinished, tenant
# ARGV id, spec, state, owner, created, max_jobs, life_ms, digest or "", listed
CREATE = """
if ARGV[8] ~= '' then
  local known = redis.call('GET', KEYS[2])
  if known then return {'known', known} end
end
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[6]) then return {'full'} end
redis.call('HSET', KEYS[1], 'spec', ARGV[2], 'state', ARGV[3], 'owner', ARGV[4],
           'final', '0', 'cancel', '0', 'attempts', '1', 'last', '0')
redis.call('PEXPIRE', KEYS[1], ARGV[7])
redis.call('ZADD', KEYS[3], ARGV[5], ARGV[1])
if ARGV[9] == '1' then
  redis.call('ZADD', KEYS[4], ARGV[5], ARGV[1])
  redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -2 * tonumber(ARGV[6]) - 1)
  redis.call('PEXPIRE', KEYS[4], ARGV[7])
end
if ARGV[8] ~= '' then
  redis.call('SET', KEYS[2], ARGV[1] .. ' ' .. ARGV[8], 'PX', ARGV[7])
end
return {'made'}
"""

# KEYS job, events, unfinished, finished, webhooks, held, sizes, then every picture's key, then
#      every preview's
# ARGV id, owner, now_s, life_ms, max_events, state, final, webhook, number of pictures,
#      number of events, channel, (number, name, data)…, then (position among the keys after sizes,
#      value)…
WRITE = """
local owner, final, state, last = unpack(redis.call('HMGET', KEYS[1],
                                                    'owner', 'final', 'state', 'last'))
if not owner then return {'gone'} end
if owner ~= ARGV[2] or (final == '1' and state ~= ARGV[6]) then return {'lost'} end
if final == '1' then return {'written', '0'} end
local life, pictures = ARGV[4], tonumber(ARGV[9])
local at = 12
for _ = 1, tonumber(ARGV[10]) do
  if tonumber(ARGV[at]) > tonumber(last) then
    last = ARGV[at]
    redis.call('XADD', KEYS[2], 'MAXLEN', ARGV[5], last .. '-0',
               'name', ARGV[at + 1], 'data', ARGV[at + 2])
  end
  at = at + 3
end
while at < #ARGV do
  local position, value = tonumber(ARGV[at]), ARGV[at + 1]
  local key = KEYS[7 + position]
  if position <= pictures then
    local grown = #value - redis.call('STRLEN', key)
    redis.call('INCRBY', KEYS[6], grown)
    redis.call('HINCRBY', KEYS[7], ARGV[1], grown)
  end
  redis.call('SET', key, value, 'PX', life)
  at = at + 2
end
redis.call('HSET', KEYS[1], 'state', ARGV[6], 'last', last)
redis.call('PEXPIRE', KEYS[1], life)
redis.call('PEXPIRE', KEYS[2], life)
if ARGV[7] == '1' then
  redis.call('HSET', KEYS[1], 'final', '1')
  redis.call('ZREM', KEYS[3], ARGV[1])
  redis.call('ZADD', KEYS[4], ARGV[3], ARGV[1])
  if ARGV[8] == '1' then redis.call('ZADD', KEYS[5], ARGV[3], ARGV[1]) end
  for i = 8, #KEYS do
    if i <= 7 + pictures then redis.call('PEXPIRE', KEYS[i], life)
    else redis.call('DEL', KEYS[i]) end
  end
end
redis.call('PUBLISH', ARGV[11], ARGV[1])
return {'written', redis.call('HGET', KEYS[1], 'cancel')}
"""

# KEYS job, unfinished, tenant
# ARGV id, spec, state, owner, created, life_ms, attempts, cancel, last, listed
RESTORE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'spec', ARGV[2], 'state', ARGV[3], 'owner', ARGV[4],
           'final', '0', 'cancel', ARGV[8], 'attempts', ARGV[7], 'last', '0')
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('ZADD', KEYS[2], ARGV[5], ARGV[1])
if ARGV[10] == '1' then
  redis.call('ZADD', KEYS[3], ARGV[5], ARGV[1])
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
return 1
"""

# KEYS job   ARGV nothing
CANCEL = """
if redis.call('HGET', KEYS[1], 'final') ~= '0' then return 0 end
redis.call('HSET', KEYS[1], 'cancel', '1')
return 1
"""

# KEYS job, unfinished, the old owner's beat   ARGV id, old owner, new owner
ADOPT = """
local owner, final = unpack(redis.call('HMGET', KEYS[1], 'owner', 'final'))
if not owner or final == '1' then
  redis.call('ZREM', KEYS[2], ARGV[1])
  return 0
end
if owner ~= ARGV[2] or redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'attempts', 1)
return 1
"""

# KEYS finished, held, sizes, webhooks, tries, job, then whatever else to delete   ARGV id
FORGET = """
if redis.call('HGET', KEYS[6], 'final') == '0' then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
local size = redis.call('HGET', KEYS[3], ARGV[1])
if size then
  redis.call('DECRBY', KEYS[2], size)
  redis.call('HDEL', KEYS[3], ARGV[1])
end
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('HDEL', KEYS[5], ARGV[1])
for i = 6, #KEYS do redis.call('DEL', KEYS[i]) end
return 1
"""

# KEYS webhooks, tries   ARGV now_s, busy_until_s
DUE = """
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, 1)
if #ids == 0 then return {} end
redis.call('ZADD', KEYS[1], ARGV[2], ids[1])
return {ids[1], redis.call('HINCRBY', KEYS[2], ids[1], 1) - 1}
"""
