// The first synchronisation of a call; see exchange.hpp.
#include "exchange.hpp"

#include "../common/routing.hpp"

namespace deepep {
namespace {

// The first value in which a peer differs, kNumAgreed when there is none.
uint32_t first_difference(const MessageHeader& ours, const MessageHeader& theirs) {
  for (uint32_t i = 0; i < kNumAgreed; ++i) {
    if (!agree_on(i, agreed_value(ours, i), agreed_value(theirs, i))) return i;
  }
  return kNumAgreed;
}

// Whether those who have rows say alike whether weights travel with them. A rank without rows goes with the first that has
// some, so that it finds a disagreement of the others, too.
bool check_opinions(Operation& op, const Exchange& exchanged) {
  uint32_t opinion = exchanged.sender(op.buffer.rank).topk_weights, of = op.buffer.rank;
  for (uint32_t peer = 0; peer < op.buffer.options.num_ranks; ++peer) {
    if (exchanged.from[peer] == nullptr) continue;
    const uint32_t theirs = exchanged.sender(peer).topk_weights;
    if (opinion == kNoOpinion) opinion = theirs, of = peer;
    if (agree_on(kAgreedTopkWeights, opinion, theirs)) continue;
    op.fail({.code = DEEPEP_ERROR_MISMATCH,
             .peer = static_cast<int32_t>(peer),
             .reason = Reason::disagreement,
             .agreed = 1,
             .a = kAgreedTopkWeights,
             .b = static_cast<int32_t>(of) + 1,
             .expected = opinion,
             .seen = theirs});
    return false;
  }
  return true;
}

// What every rank finds alike in the messages: a refusal, or a disagreement.
bool check_messages(Operation& op, const Exchange& exchanged) {
  const MessageHeader& ours = *exchanged.from[op.buffer.rank];  // as this rank has published it
  const uint32_t num_ranks = op.buffer.options.num_ranks;
  for (uint32_t peer = 0; peer < num_ranks; ++peer) {
    if (peer == op.buffer.rank || exchanged.from[peer] == nullptr || exchanged.sender(peer).code == 0) continue;
    fail_refused(op, peer, exchanged.sender(peer).code);
    return false;
  }
  for (uint32_t peer = 0; peer < num_ranks; ++peer) {
    if (peer == op.buffer.rank || exchanged.from[peer] == nullptr) continue;
    const MessageHeader& message = *exchanged.from[peer];
    const uint64_t epoch = load_acquire(&message.epoch);
    const uint32_t i = first_difference(ours, message);
    if (epoch == op.epoch && i == kNumAgreed) continue;
    const uint32_t theirs = agreed_value(message, i);
    if (epoch == op.epoch && i == kAgreedOp) {
      fail_elsewhere(op, peer, static_cast<int32_t>(theirs));
    } else if (epoch == op.epoch) {
      op.fail({.code = DEEPEP_ERROR_MISMATCH,
               .peer = static_cast<int32_t>(peer),
               .reason = Reason::disagreement,
               .agreed = 1,
               .a = static_cast<int32_t>(i),
               .expected = agreed_value(ours, i),
               .seen = theirs});
    } else {
      op.fail({.code = DEEPEP_ERROR_MISMATCH,
               .peer = static_cast<int32_t>(peer),
               .reason = Reason::other_call,
               .agreed = 1,
               .expected = static_cast<int64_t>(op.epoch),
               .seen = static_cast<int64_t>(epoch)});
    }
    return false;
  }
  return check_opinions(op, exchanged);
}

// A peer that came may have been left out since: another rank has given it up.
void drop_masked(const Buffer& buffer, Exchange& exchanged) {
  exchanged.view &= ~buffer.masked.load(std::memory_order_relaxed);
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (!in_view(exchanged.view, peer)) exchanged.from[peer] = nullptr;
  }
}

// MASK_ON_TIMEOUT: those take part whose messages everyone has. A rank that one peer has given up, and that came to this
// one just in time, is left out here too.
bool agree_on_view(Operation& op, PeerWait wait, Exchange& exchanged) {
  Buffer& buffer = op.buffer;
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (peer == buffer.rank || !in_view(exchanged.view, peer)) continue;
    View* view = view_at(buffer.symmetric(peer), buffer.regions, buffer.rank);
    view->ranks = exchanged.view;
    store_release(&view->epoch, op.epoch);  // Pairs with the wait below, at the peer.
    ring(buffer, peer);
  }
  uint64_t common = exchanged.view;
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (peer == buffer.rank || !in_view(exchanged.view, peer)) continue;
    const View* view = view_at(buffer.symmetric(buffer.rank), buffer.regions, peer);
    // Pairs with the release above, of the peer.
    const Arrival arrival = wait.wait_for(peer, &view->epoch, op.epoch, {Reason::late_view});
    if (arrival == Arrival::failed) return false;
    common &= arrival == Arrival::arrived ? view->ranks : ~(uint64_t{1} << peer);
    if (!in_view(common, buffer.rank)) {
      fail_left_out(op, peer);
      return false;
    }
  }
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (in_view(exchanged.view & ~common, peer)) buffer.mask_now(peer);
  }
  drop_masked(buffer, exchanged);
  return true;
}

}  // namespace

void publish(Operation& op, const Draft& draft, uint32_t to) {
  Buffer& buffer = op.buffer;
  MessageHeader* message = message_at(buffer.symmetric(to), buffer.regions, buffer.rank, op.epoch);
  std::array<uint32_t, kNumAgreed> agreed = draft.agreed;
  agreed[kAgreedMaskOnTimeout] = buffer.mask_on_timeout ? 1 : 0;
  const auto say = [&](uint32_t word, uint32_t value) { message->words[word] = count_word(op.epoch, value); };
  say(kMessageSender, sender_word({draft.slot, op.op, agreed[kAgreedTopkWeights], op.failure.code}));
  for (uint32_t i = 0; i < kNumAgreed; ++i) say(kMessageAgreed + i, agreed[i]);
  if (draft.tokens_per_rank != nullptr) {
    uint64_t* counts = message_counts(message);
    for (uint32_t i = 0; i < buffer.options.num_ranks; ++i) *counts++ = count_word(op.epoch, draft.tokens_per_rank[i]);
    for (uint32_t i = 0; i < buffer.options.num_experts; ++i) *counts++ = count_word(op.epoch, draft.entries_per_expert[i]);
  }
  store_release(&message->epoch, op.epoch);  // Pairs with the acquire of `to` in exchange().
}

bool exchange(Operation& op, const Draft& draft, PeerWait& wait, Exchange& out) {
  Buffer& buffer = op.buffer;
  const uint32_t num_ranks = buffer.options.num_ranks;
  const Failure own = op.failure;  // a refusal of this rank; it gathers nevertheless, so that it never runs ahead of a reader
  const uint64_t masked = buffer.masked.load(std::memory_order_relaxed);
  for (uint32_t peer = 0; peer < num_ranks; ++peer) {
    if (!in_view(masked, peer)) publish(op, draft, peer);
  }
  for (uint32_t peer = 0; peer < num_ranks; ++peer) {
    if (!in_view(masked, peer)) ring(buffer, peer);
  }
  op.failure = Failure{};
  out.view = 0;
  for (uint32_t peer = 0; peer < num_ranks; ++peer) {
    MessageHeader* message = message_at(buffer.symmetric(buffer.rank), buffer.regions, peer, op.epoch);
    if (peer != buffer.rank) {
      // Pairs with the release in publish() of the peer.
      const Arrival arrival = wait.wait_for(peer, &message->epoch, op.epoch, {Reason::late_message});
      if (arrival == Arrival::failed) {
        op.agreed = false;
        return false;
      }
      if (arrival == Arrival::left_out) continue;
    }
    out.view |= uint64_t{1} << peer;
    out.from[peer] = message;
  }
  drop_masked(buffer, out);
  if (own.code != 0) {
    op.failure = own;
    return false;
  }
  if (!check_messages(op, out)) return false;
  return !draft.pushes || !buffer.mask_on_timeout || agree_on_view(op, wait.again(), out);
}

}  // namespace deepep
