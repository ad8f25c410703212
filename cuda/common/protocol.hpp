// What ranks say to each other: the words of a control area, and why two synchronisations a layer suffice.
//
// In: nothing. Out: plain structs that lie at the offsets of regions.hpp, shared by the CPU backend (std::atomic_ref) and
// by device code (system-scope acquire and release). Callers: wait, exchange, dispatch, combine, low latency.
//
// Epochs. A rank numbers the collective calls of a buffer from 1. All ranks make the same calls in the same order, so equal
// numbers mean the same call. Every flag is an epoch, is only ever raised, and is compared with "at least": nothing is
// cleaned, a stale flag cannot match, and after a recovery everything up to the base epoch means nothing. A word that holds a
// value as well has the low half of the epoch, which is compared for equality: to match it must be 2^32 calls old to the call,
// and nobody has written it since: a message's counts only dispatches with a new routing write, a low-latency word only low
// latency. check_recovery() keeps recoveries from a number that is as far from a recent call. All operations of a rank run on
// one serial communication stream; "rank s is past e" means its stream has ended call e.
//
// Synchronisation one, the message: `messages[s][e % ring]` in rank A's control area says that s has reached call e, which
// slot s uses in it, and for a dispatch how many rows s sends to every rank. Before that, s's earlier holder of the slot was
// released in stream order. So whoever has read the message may write rows into that slot of s. No rank pushes before it has
// the messages of all ranks; hence when the first row of call e arrives anywhere, every rank is past the pushes of all calls
// before e, and a late push of an earlier call cannot hit the slot's new holder.
// Synchronisation two, the flag `pushed[s][slot]` = e in A: s has put all its rows of call e into that slot of A. On a GPU each
// block of s that may push rows says so by itself (`row_flags[s]`), unless ranks may be left out: then its leader says it when
// it knows who is.
//
// Combine needs one of each as well: its message says that s's expert outputs are complete, after which they are pulled;
// `pulled[s][slot]` = e says that s has read all it wants from that slot of A. Only what overwrites the expert-output region
// waits for it: the next combine's copy-in, or deepep_expert_output when the user is about to write. A dispatch into the
// same slot does not touch that region, so a layer waits for `pulled` only where the next combine does, when it is long there.
// Low-latency combine announces itself by `ready[s][slot of A]` instead, because its receive half may come many calls later,
// when the message ring has gone round. That line is rewritten only by the next combine of the same result, which waits for
// A's `pulled` first where it writes to the region; where it does not, A may find a later announcement, which holds as well.
//
// The ring. s writes message e + ring over message e. Calls other than the send half of a low-latency combine wait for the
// message of A, or for its count words, and A publishes e only when it is past e - 1. So s is ahead of a reader A that still
// needs message e by at most one such call and one send half a slot (a slot with a receive half to come refuses another):
// num_slots + 2 messages are in use at once, the ring has 2 * num_slots + 2 at least.
//
// Failures. An error that a rank finds in its own arguments travels in its message (`code`), one that follows from all
// messages (capacity, disagreement) is found by every rank alike: both before a byte moves, so the buffer stays good. A rank
// that fails half-way raises `aborts[s]` in every peer, so that nobody waits for the deadline in vain; it counts in calls
// from its epoch on until the next recovery, or until the rank that it blames is masked. Until then it makes no call, and
// receives nothing of what earlier ones have sent: so with a mask that ends a failure it raises `pulled` everywhere, up to the
// call that it has come to, and what was still to be received of combines is given up.
//
// Leaving ranks out. Under MASK_ON_TIMEOUT a call goes on without a rank that does not come. Rows have their places by the
// counts of those who take part, so all must leave out the same: before rows are pushed, every rank publishes whose messages
// it has (`views[s]`), and those take part whom everyone has. A rank that dies later has left a hole among the received rows.
// Should two ranks push with different views nevertheless (`pushed_view`), the call fails rather than mix rows up.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../abi/deepep.h"
#include "regions.hpp"

namespace deepep {

// Where a rank sleeps. Whoever has raised a word that it may wait for rings afterwards.
struct Doorbell {
  uint32_t rings;        // futex word: counts the rings
  uint32_t unused[15];   // a line of its own: the word below is written by the owner
  uint64_t waiting_for;  // bit p: the owner sleeps, or is about to, until rank p raises something
};
static_assert(sizeof(Doorbell) <= kRegionAlignment);

// What all ranks must say alike in a call. Compared value by value, so that an error can name what differs.
enum Agreed : uint32_t {
  kAgreedOp,
  kAgreedLayout,
  kAgreedExpertAlignment,
  kAgreedRowBytes,
  kAgreedNumScales,
  kAgreedScaleElemBytes,
  kAgreedNumTopk,
  kAgreedTopkIdxBytes,
  kAgreedTopkWeights,  // 0 = without, 1 = with, kNoOpinion = this rank has no rows to tell from
  kAgreedCached,
  kAgreedFlags,
  kAgreedMaskOnTimeout,
  kAgreedRouting,  // low 32 bits of the epoch of the dispatch that made the handle
  kNumAgreed,
};
constexpr const char* kAgreedNames[kNumAgreed] = {
    "op",
    "layout",
    "expert_alignment",
    "row_bytes",
    "num_scales",
    "scale_elem_bytes",
    "num_topk",
    "topk_idx_bytes",
    "topk_weights",
    "cached",
    "flags (the shared ones)",
    "MASK_ON_TIMEOUT",
    "the handle's dispatch",
};
constexpr uint32_t kNoOpinion = 2;

// A word that names its call: epoch << 32 | value. It needs no other word to be believed, and may be stored in any order.
DEEPEP_HOST_DEVICE constexpr uint64_t count_word(uint64_t epoch, uint32_t value) { return epoch << 32 | value; }
DEEPEP_HOST_DEVICE constexpr bool is_count_of(uint64_t word, uint64_t epoch) {
  return static_cast<uint32_t>(word >> 32) == static_cast<uint32_t>(epoch);
}

// A message: this header, then for a dispatch tokens_per_rank [num_ranks] and entries_per_expert [num_experts]; all of it count
// words. A call that goes well needs the first two of the header. The values say what differs. On a GPU each store takes time:
// there a rank sends them when it has found a difference, as its peer then does.
enum MessageWord : uint32_t {
  kMessageHash,    // agreed_hash() of what all ranks must say alike; the CPU backend compares the values
  kMessageSender,  // sender_word()
  kMessageAgreed,  // the first of kNumAgreed
  kNumMessageWords = kMessageAgreed + kNumAgreed,
};
struct MessageHeader {
  uint64_t epoch;  // of the CPU backend: stored last, with release
  alignas(16) uint64_t words[kNumMessageWords];
};
static_assert(sizeof(MessageHeader) <= kMessageHeaderBytes);

// What a message says that need not be the same on all ranks.
struct Sender {
  uint32_t slot;          // of the sender, used in this call
  int32_t op;             // DEEPEP_OP_*
  uint32_t topk_weights;  // its value for kAgreedTopkWeights, which no hash can have
  int32_t code;           // DEEPEP_ERROR_*: the sender cannot make this call; 0 = all is well
};
static_assert(DEEPEP_OP_EXPERT_OUTPUT < 16 && kMaxSlots < 256);  // the last op
DEEPEP_HOST_DEVICE constexpr uint32_t sender_word(const Sender& sender) {
  return sender.slot << 24 | static_cast<uint32_t>(sender.op) << 20 | sender.topk_weights << 16 |
         (static_cast<uint32_t>(sender.code) & 0xffff);
}
DEEPEP_HOST_DEVICE constexpr Sender sender_from_word(uint32_t word) {
  return {word >> 24, static_cast<int32_t>(word >> 20 & 15), word >> 16 & 15, static_cast<int32_t>(word & 0xffff)};
}

// A sum, so that a value which only the device knows can be added to it; a value of 0 adds nothing.
DEEPEP_HOST_DEVICE constexpr uint32_t agreed_term(uint32_t nth, uint32_t value) {
  uint32_t mixed = value * 0x9e3779b1u;
  mixed = (mixed ^ mixed >> 15) * 0x85ebca77u;
  return (mixed ^ mixed >> 13) * (2 * nth + 0x27d4eb2fu);
}
DEEPEP_HOST_DEVICE constexpr uint32_t agreed_hash(const uint32_t* agreed) {
  uint32_t hash = 0;
  for (uint32_t nth = 0; nth < kNumAgreed; ++nth) hash += nth == kAgreedTopkWeights ? 0 : agreed_term(nth, agreed[nth]);
  return hash;
}
// Whether two ranks say alike the nth value that all must say alike.
DEEPEP_HOST_DEVICE constexpr bool agree_on(uint32_t nth, uint32_t ours, uint32_t theirs) {
  return ours == theirs || (nth == kAgreedTopkWeights && (ours == kNoOpinion || theirs == kNoOpinion));
}
// What a message says of them, and of its sender.
DEEPEP_HOST_DEVICE inline uint32_t agreed_value(const MessageHeader& message, uint32_t nth) {
  return static_cast<uint32_t>(message.words[kMessageAgreed + nth]);
}
DEEPEP_HOST_DEVICE inline Sender sender_of(const MessageHeader& message) {
  return sender_from_word(static_cast<uint32_t>(message.words[kMessageSender]));
}

// The ranks whose messages a rank has, under MASK_ON_TIMEOUT.
struct View {
  uint64_t epoch;  // stored last, with release
  uint64_t ranks;
};
static_assert(sizeof(View) <= kLineBytes);

// Count words: what a low-latency dispatch says beside its message when all blocks of a GPU work out the places of their rows
// by themselves. u64 [num_experts] entries for each expert, then the infos: nobody waits for a leader. They lie in a ring like
// the messages, and for the same reason.
enum CountInfo : uint32_t {
  kInfoAgreed,  // agreed_hash() of what all ranks must say alike: the messages find out which value differs
  kInfoSender,  // count_sender_word()
};
struct CountSender {
  uint32_t slot;      // of the sender, used in this call
  bool refuses;       // the message says why
  bool turns_scales;  // to and from ranks of other GPUs that say so, too, scales go as rows; the receiver makes columns of them
};
DEEPEP_HOST_DEVICE constexpr uint32_t count_sender_word(const CountSender& sender) {
  return sender.slot << 24 | (sender.turns_scales ? 2 : 0) | (sender.refuses ? 1 : 0);
}
DEEPEP_HOST_DEVICE constexpr CountSender count_sender_from_word(uint32_t word) {
  return {word >> 24, (word & 1) != 0, (word & 2) != 0};
}

// Announcement of a low-latency combine, for one slot of the reader. What it says names its epoch as well, a count word: then
// nobody has to store one before the other.
struct ReadyLine {
  uint64_t epoch;  // a release, or after a fence: the outputs are there
  uint64_t said;   // count_word(epoch, ready_said())
};
static_assert(sizeof(ReadyLine) <= kLineBytes);
DEEPEP_HOST_DEVICE constexpr uint32_t ready_said(int32_t code, uint32_t flags) {
  return static_cast<uint32_t>(code) << 16 | (flags & 0xffff);
}
DEEPEP_HOST_DEVICE constexpr int32_t code_said(uint64_t said) { return static_cast<int32_t>(said >> 16 & 0xffff); }
DEEPEP_HOST_DEVICE constexpr uint32_t flags_said(uint64_t said) { return static_cast<uint32_t>(said) & 0xffff; }

// Who may still read what is in a slot's expert-output region.
struct Readers {
  uint64_t epoch;  // of the last combine that used it; 0 = nobody reads
  uint64_t ranks;  // whom that has told
};

// An abort word: epoch << 16 | code << 8 | culprit. One word, so that it is never seen half-written.
struct Abort {
  uint64_t epoch = 0;
  int32_t code = 0;
  uint32_t culprit = 0;
  bool goes_on = false;  // the sender has only left the culprit out and goes on with the call
};
constexpr uint64_t kAbortGoesOn = 0x80;
// The highest epoch that a recovery may continue at: the word has 48 bits for epochs, and calls come on top.
constexpr uint64_t kMaxBaseEpoch = uint64_t{1} << 47;
// How many calls a rank can be behind another and still be told so: a message farther ahead is rather an old one, from before a
// recovery.
constexpr uint64_t kMaxLead = 1 << 20;
// And how far from a multiple of 2^32 above a rank's own, for the words that name their call by the low half of its epoch: so
// that what the messages of a ring say is never that far ahead.
constexpr uint64_t kEpochMargin = 2 * kMaxLead;
static_assert(2 * kMaxSlots + 2 <= kMaxLead);

DEEPEP_HOST_DEVICE constexpr uint64_t abort_word(const Abort& abort) {
  const uint64_t code = static_cast<uint64_t>(abort.code) | (abort.goes_on ? kAbortGoesOn : 0);
  return abort.epoch << 16 | code << 8 | abort.culprit;
}

DEEPEP_HOST_DEVICE constexpr Abort abort_from_word(uint64_t word) {
  const uint64_t code = (word >> 8) & 0xff;
  return {word >> 16, static_cast<int32_t>(code & (kAbortGoesOn - 1)), static_cast<uint32_t>(word & 0xff),
          (code & kAbortGoesOn) != 0};
}

// Addresses in a control area.
DEEPEP_HOST_DEVICE inline Doorbell* doorbell_at(uint8_t* base, const Regions& regions) {
  return reinterpret_cast<Doorbell*>(base + regions.doorbell);
}
DEEPEP_HOST_DEVICE inline uint64_t* abort_at(uint8_t* base, const Regions& regions, uint32_t src) {
  return reinterpret_cast<uint64_t*>(base + regions.aborts + src * kLineBytes);
}
DEEPEP_HOST_DEVICE inline View* view_at(uint8_t* base, const Regions& regions, uint32_t src) {
  return reinterpret_cast<View*>(base + regions.views + src * kLineBytes);
}
// `part` is regions.pushed, pushed_view or pulled.
DEEPEP_HOST_DEVICE inline uint64_t* slot_word_at(uint8_t* base, uint64_t part, uint32_t src, uint32_t slot) {
  return reinterpret_cast<uint64_t*>(base + part + src * kLineBytes) + slot;
}
DEEPEP_HOST_DEVICE inline ReadyLine* ready_at(uint8_t* base, const Regions& regions, uint32_t src, uint32_t slot) {
  return reinterpret_cast<ReadyLine*>(base + regions.ready + (src * kMaxSlots + slot) * kLineBytes);
}
DEEPEP_HOST_DEVICE inline MessageHeader* message_at(uint8_t* base, const Regions& regions, uint32_t src, uint64_t epoch) {
  const uint64_t index = src * uint64_t{regions.message_ring} + (epoch & (regions.message_ring - 1));
  return reinterpret_cast<MessageHeader*>(base + regions.messages + index * regions.message_bytes);
}
// What a block of a GPU says of its rows: the epoch, and how many blocks there are, so that a word tells how many to look for.
DEEPEP_HOST_DEVICE constexpr uint64_t row_flag(uint64_t epoch, uint32_t blocks) { return epoch << 8 | (blocks - 1); }
DEEPEP_HOST_DEVICE constexpr uint64_t epoch_of_row_flag(uint64_t word) { return word >> 8; }
DEEPEP_HOST_DEVICE constexpr uint32_t blocks_of_row_flag(uint64_t word) { return static_cast<uint32_t>(word & 0xff) + 1; }
static_assert(kMaxBlocks <= 256);
DEEPEP_HOST_DEVICE inline uint64_t* row_flags_at(uint8_t* base, const Regions& regions, uint32_t src) {
  return reinterpret_cast<uint64_t*>(base + regions.row_flags) + src * kMaxBlocks;
}
DEEPEP_HOST_DEVICE inline uint64_t* count_words_at(uint8_t* base, const Regions& regions, uint32_t num_experts, uint32_t src,
                                                   uint64_t epoch) {
  const uint64_t index = src * uint64_t{regions.message_ring} + (epoch & (regions.message_ring - 1));
  return reinterpret_cast<uint64_t*>(base + regions.count_words) + index * (num_experts + kNumCountInfos);
}
DEEPEP_HOST_DEVICE inline uint64_t* message_counts(MessageHeader* message) {
  return reinterpret_cast<uint64_t*>(reinterpret_cast<uint8_t*>(message) + kMessageHeaderBytes);
}

}  // namespace deepep
