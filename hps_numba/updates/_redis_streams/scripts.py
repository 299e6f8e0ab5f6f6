"""What a server does in one step while a stream is read, so that nothing is trimmed between counting and reading.

A server counts what was ever added to a stream and what is in it: the difference was removed, from its beginning. If more was
removed than a reader has read, then that much was lost. So nothing needs to be written into the entries.
"""

from __future__ import annotations

__all__ = ["FREE_LEASE", "READ_GROUP", "READ_STREAM", "RENEW_LEASE", "START_OVER"]

_COUNTS = """
local function numbers_of(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end
local function counts_of(stream)
  if redis.call('EXISTS', stream) == 0 then return 0, 0, '0-0' end
  local facts = numbers_of(redis.call('XINFO', 'STREAM', stream))
  if not facts['entries-added'] then error('expected Redis 7 or later, or Valkey') end
  return facts['entries-added'], facts['entries-added'] - facts['length'], facts['last-generated-id']
end
"""

#: KEYS stream; ARGV last id, count, 1 to look whether the last entry is still there
#: -> added, removed, last id of the stream, whether the last entry is there (1, 0; or -1: not looked), entries
READ_STREAM = (
    _COUNTS
    + """
local added, removed, newest = counts_of(KEYS[1])
local there = -1
if ARGV[3] == '1' then there = #redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) end
local entries = {}
if added > 0 then entries = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2]) end
return {added, removed, newest, there, entries}
"""
)

#: KEYS stream, lease, a key that is there from a loss on; ARGV group, consumer, holder, ms of a lease, count, '' to begin or
#: '>' or the cursor of pending entries, a holder that is known to be gone
#: -> 'held', holder | 'began', 1 if the group was made, 1 if there was a loss
#:    | 'pending', next cursor, entries, ids of removed ones
#:    | 'new', added, lost, read so far, last id of the stream, last id read, entries
READ_GROUP = (
    _COUNTS
    + """
local stream, lease = KEYS[1], KEYS[2]
local group, consumer, holder, ms, count, at, gone = unpack(ARGV)
local held = redis.call('GET', lease)
if held and held ~= holder and held ~= gone then return {'held', held} end
redis.call('SET', lease, holder, 'PX', ms)
if held ~= holder or at == '' then
  local _, before = counts_of(stream)
  local made = redis.pcall('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM', 'ENTRIESREAD', before)
  if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
  return {'began', made.err and 0 or 1, redis.call('EXISTS', KEYS[3])}
end
if at ~= '>' then
  local claimed = redis.call('XAUTOCLAIM', stream, group, consumer, 0, at, 'COUNT', count)
  local removed = claimed[3] or {}
  if #removed > 0 then redis.call('SET', KEYS[3], 1) end
  return {'pending', claimed[1], claimed[2], removed}
end
local added, removed, newest = counts_of(stream)
local lost, mine = 0, nil
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local facts = numbers_of(flat)
  if facts['name'] == group then mine = facts end
end
if not mine then return redis.error_reply('NOGROUP ' .. group) end
local done = mine['entries-read']
if done and removed > done then
  lost, done = removed - done, removed
  redis.call('SET', KEYS[3], 1)
  redis.call('XGROUP', 'SETID', stream, group, mine['last-delivered-id'], 'ENTRIESREAD', done)
end
local entries, last = {}, mine['last-delivered-id']
if tonumber(count) > 0 then
  local got = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', count, 'STREAMS', stream, '>')
  if got then
    entries = got[1][2]
    last = entries[#entries][1]
  end
end
return {'new', added, lost, (done or -1), newest, last, entries}
"""
)

#: KEYS stream, lease; ARGV group, holder -> 1 if it is held, and the group begins with the oldest entry
START_OVER = (
    _COUNTS
    + """
if redis.call('GET', KEYS[2]) ~= ARGV[2] then return 0 end
local _, removed = counts_of(KEYS[1])
redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM', 'ENTRIESREAD', removed)
return 1
"""
)

#: KEYS lease; ARGV holder, ms -> 1 if it is still held
RENEW_LEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

#: KEYS lease; ARGV holder
FREE_LEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
