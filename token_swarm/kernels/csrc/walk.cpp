// The byte walk: heads of several groups moved byte by byte until one of them needs a forward. The algorithm, and the
// reasons for it, are those of mixing/byte_group.py and mixing/byte_unit.py, which this is tested against.
#include "unit.h"

#include "kernels.h"

namespace baseline {
#include "intervals.h"
#include "sizes.h"
}  // namespace baseline

struct LawView {
    const void* probabilities;  // [tokens] in byte-sorted order
    const double* sums;         // [tokens / STRIDE + 1], of what comes before every STRIDE-th token
    double end;
    int32_t wide;  // probabilities are double, not float
};

struct GroupSpec {
    const int64_t* order;
    const int32_t *low, *high, *longer, *first_child;
    const uint8_t* byte;
    int64_t tokens;
    double epsilon;
    int64_t window;  // -1: nothing is given up
    int64_t max_heads;
    double split_discount, boundary_floor, negligible, exact_below;
    double weight;
    int64_t members;
    const double* exponents;  // [members]
    int64_t history_tokens, prompt_tokens;
    const uint8_t* tail;
    int64_t tail_length;
};

struct HeadView {
    int64_t key, start, length;
    double weight;
    int32_t history, law, node, group;
};

struct GroupView {
    double certificate, retired;
    int64_t heads, best_length;
    int32_t best_history, lost;
};

enum Status : int32_t { NEEDS_FORWARD, ENDED, NOTHING_FOLLOWS, LIMIT, NEEDS_UNSHAPED };

struct WalkView {
    const double* uniforms;  // one for every symbol; null for greedy
    int64_t uniform_count;
    const uint8_t* script;  // bytes to follow instead of choosing, the next one to choose first; null to choose
    int64_t max_bytes;
    int64_t max_tokens;  // of the group that needs fewest; 0 for no limit
    uint8_t* bytes;      // [max_bytes]
    double* log_probs;   // [max_bytes + 1]
    double* shares;      // [experts], summed over the symbols
    int64_t count;       // bytes appended
    int64_t symbols;     // symbols chosen
    double certificate;
    int32_t status, symbol;  // symbol: the last one chosen
};

namespace {

constexpr int64_t STRIDE = baseline::STRIDE;
constexpr int END = 256, ROOT = 0, SYMBOL_COUNT = baseline::SYMBOLS, ROOM = baseline::ROOM;
constexpr int64_t DEAD = -1;  // no head has this key

struct Law {
    LawView own;
    std::vector<LawView> members;
    // Masses of the first bytes, the end included: looked up all over the vocabulary, so once. [ROOM]
    std::vector<double> first;
};

struct Head {
    int64_t key, start, length;
    double weight, pending;
    int32_t history, law, node;
    double boundary = 1;  // of a cold head that starts here: what the boundary law adds up to for it, set by `law`

    double mass() const { return weight * pending; }
};

class Group {
public:
    explicit Group(const GroupSpec& spec) : spec(spec), exponents(spec.exponents, spec.exponents + spec.members) {
        if (spec.tail_length) text.assign(spec.tail, spec.tail + spec.tail_length);
        heads.push_back({0, 0, spec.history_tokens, 1.0, 1.0, -1, -1, ROOT});
    }

    GroupSpec spec;
    std::vector<double> exponents;
    std::vector<uint8_t> text;
    std::vector<Head> heads;
    std::vector<Law> laws;
    double retired = 0;
    bool lost = false;

    double total() const {
        double sum = 0;
        for (auto& head : heads) sum += head.mass();
        return sum;
    }

    double certificate() const {
        double unknown = 0;
        for (auto& head : heads)
            if (head.law < 0) unknown += head.mass();
        return unknown != 0 ? unknown / total() : 0;
    }

    const Head* best() const {
        const Head* top = nullptr;
        for (auto& head : heads)
            if (!top || head.mass() > top->mass()) top = &head;
        return top;
    }

    int64_t own_tokens() const {
        const Head* head = best();
        return head ? std::max<int64_t>(0, head->length - spec.prompt_tokens) : 0;
    }

    // Indices of cold heads, heaviest first.
    std::vector<int> cold() const {
        std::vector<int> found;
        for (size_t i = 0; i < heads.size(); i++)
            if (heads[i].law < 0) found.push_back(int(i));
        std::stable_sort(found.begin(), found.end(), [&](int a, int b) { return heads[a].weight > heads[b].weight; });
        return found;
    }

    bool is_due() const {
        if (lost) return false;
        double unknown = 0, sum = 0;
        for (auto& head : heads) {
            sum += head.mass();
            if (head.law < 0) unknown += head.mass();
        }
        return unknown > std::max(spec.epsilon, spec.negligible) * sum;
    }

    std::vector<int> due() const {
        std::vector<int> named;
        if (!is_due()) return named;
        auto candidates = cold();
        double unknown = 0;
        for (int i : candidates) unknown += heads[i].mass();
        const double limit = std::max(spec.epsilon, spec.negligible) * total();
        for (int i : candidates) {
            // `is_due` may have added up in another order: what it says must name a head, or nobody would go on.
            if (unknown <= limit && !named.empty()) break;
            named.push_back(i);
            unknown -= heads[i].mass();
        }
        return named;
    }

    template <class L>
    void put(size_t slot, L&& law) {
        if (slot >= laws.size()) laws.resize(slot + 1);
        laws[slot] = std::move(law);
        has_law = false;  // a head may have the slot already
    }

    void feed(int64_t key, int32_t law) {
        size_t i = index_of(key);
        heads[i].law = law;
        heads[i].node = ROOT;
        heads[i].pending = pending(laws[law].own, ROOT);
        has_law = false;
        if (spec.window >= 0) {
            std::fill(boundary, boundary + SYMBOL_COUNT, spec.boundary_floor);
            TS_PICK(add_law)(boundary, 1.0, first(law));
            TS_PICK(scale_law)(boundary);
            has_boundary = true;
        }
        for (size_t at = size_t(heads[i].start); at < text.size(); at++)
            if (!move(i, text[at], int64_t(at) + 1)) {
                heads.erase(heads.begin() + int64_t(i));
                break;
            }
        settle();
    }

    const double* law() {
        if (!has_law) {
            double fresh = 0;
            for (auto& head : heads)
                if (is_fresh(head)) {
                    head.boundary = boundary_sum(head);
                    fresh += head.weight / head.boundary;
                }
            TS_PICK(set_law)(cached, fresh, boundary);
            for (auto& head : heads) {
                if (head.law >= 0 && head.node == ROOT) {
                    TS_PICK(add_law)(cached, head.weight, first(head.law));
                } else if (head.law >= 0) {
                    add_next(laws[head.law].own, head.node, head.weight, cached);
                } else if (is_fresh(head)) {
                    const double less = head.weight / head.boundary * (1 - spec.split_discount);
                    for (int32_t to = spec.first_child[head.node]; to < spec.first_child[head.node + 1]; to++)
                        cached[spec.byte[to]] -= less * boundary[spec.byte[to]];
                }
            }
            TS_PICK(scale_law)(cached);
            has_law = true;
        }
        return cached;
    }

    bool reaches(int byte) const {
        for (auto& head : heads)
            if (head.law < 0 || next_mass(laws[head.law].own, head.node, byte) > 0) return true;
        return false;
    }

    void advance(int byte) {
        if (has_boundary) {
            const double likely = std::max(law()[byte], spec.boundary_floor);
            for (auto& head : heads) {
                if (head.law >= 0) continue;
                if (is_fresh(head)) {
                    const double split = child(head.node, byte) < 0 ? 1 : spec.split_discount;
                    head.weight *= split * boundary[byte] / head.boundary;
                } else {
                    head.weight *= likely;
                }
            }
        }
        has_law = false;
        text.push_back(uint8_t(byte));
        const int64_t end = int64_t(text.size());
        const size_t old = heads.size();
        size_t dead = 0;
        for (size_t i = 0; i < old; i++)
            if (heads[i].law >= 0 && !move(i, byte, end)) {
                heads[i].key = DEAD;
                dead++;
            }
        if (dead)
            heads.erase(std::remove_if(heads.begin(), heads.end(), [](auto& head) { return head.key == DEAD; }),
                        heads.end());
        settle();
        retire();
    }

    // How much of a symbol's mass each member gave, unnormalised; 1 for all where no law tells.
    void member_masses(int symbol, double* masses) const {
        const int64_t n = spec.members;
        for (int64_t e = 0; e < n; e++) masses[e] = 0;
        bool known = false;
        for (auto& head : heads) {
            if (head.law < 0 || laws[head.law].members.empty()) continue;
            known = true;
            for (int64_t e = 0; e < n; e++)
                masses[e] += head.weight * next_mass(laws[head.law].members[size_t(e)], head.node, symbol);
        }
        if (!known) std::fill(masses, masses + n, 1.0);
    }

    // The same as shares of 1, |exponent| as prior.
    void member_shares(int symbol, double* shares) const {
        const int64_t n = spec.members;
        if (n == 1) {
            shares[0] = 1;
            return;
        }
        member_masses(symbol, shares);
        double sum = 0;
        for (int64_t e = 0; e < n; e++) sum += shares[e] *= std::fabs(exponents[size_t(e)]);
        for (int64_t e = 0; e < n; e++) shares[e] = sum > 0 ? shares[e] / sum : 1.0 / double(n);
    }

    // Tokens of a history beyond the prompt's, first to last; returns their number.
    int64_t history(int32_t at, int32_t* out, int64_t room) const {
        int64_t n = 0;
        for (int32_t i = at; i >= 0; i = arena[size_t(i)].parent) n++;
        int64_t k = n;
        for (int32_t i = at; i >= 0; i = arena[size_t(i)].parent)
            if (--k < room) out[k] = arena[size_t(i)].token;
        return n;
    }

private:
    struct Step {
        int32_t parent, token;
    };
    std::vector<Step> arena;  // histories as chains, so that a new head costs one entry
    int64_t next_key = 1;
    double boundary[ROOM] = {}, cached[ROOM];
    bool has_boundary = false, has_law = false;

    size_t index_of(int64_t key) const {
        size_t i = 0;
        while (heads[i].key != key) i++;
        return i;
    }

    // Mass of the sorted tokens [low, high): of whole strides a difference of sums, of the others at both ends their own.
    template <class T>
    double interval(const T* masses, const double* sums, int64_t low, int64_t high) const {
        const int64_t first = (low + STRIDE - 1) / STRIDE, last = high / STRIDE;
        if (first < last) {
            const double mass = sums[last] - sums[first] + baseline::sum_interval(masses, low, first * STRIDE) +
                                baseline::sum_interval(masses, last * STRIDE, high);
            if (mass >= spec.exact_below) return mass;
        }
        return baseline::sum_interval(masses, low, high);
    }

    double interval(const LawView& law, int64_t low, int64_t high) const {
        return law.wide ? interval(static_cast<const double*>(law.probabilities), law.sums, low, high)
                        : interval(static_cast<const float*>(law.probabilities), law.sums, low, high);
    }

    double pending(const LawView& law, int32_t node) const {
        if (node == ROOT) return interval(law, 0, spec.tokens) + law.end;
        return interval(law, spec.longer[node], spec.high[node]);
    }

    int32_t child(int32_t node, int byte) const {
        const int32_t first = spec.first_child[node], last = spec.first_child[node + 1];
        const uint8_t* at = std::lower_bound(spec.byte + first, spec.byte + last, uint8_t(byte));
        return at < spec.byte + last && *at == byte ? int32_t(at - spec.byte) : -1;
    }

    double next_mass(const LawView& law, int32_t node, int symbol) const {
        if (symbol == END) return node == ROOT ? law.end : 0;
        const int32_t to = child(node, symbol);
        return to < 0 ? 0 : interval(law, spec.low[to], spec.high[to]);
    }

    void add_next(const LawView& law, int32_t node, double weight, double* out) const {
        if (law.wide) add_next(static_cast<const double*>(law.probabilities), law.sums, node, weight, out);
        else add_next(static_cast<const float*>(law.probabilities), law.sums, node, weight, out);
        if (node == ROOT) out[END] += weight * law.end;
    }

    // The intervals of a node's children follow upon one another.
    template <class T>
    void add_next(const T* masses, const double* sums, int32_t node, double weight, double* out) const {
        const int32_t first = spec.first_child[node], count = spec.first_child[node + 1] - first;
        TS_PICK(add_masses<T>)
        (masses, sums, spec.tokens, count, spec.low + first, spec.high + first, spec.byte + first, spec.exact_below, weight,
         out);
    }

    const double* first(int32_t law) {
        Law& own = laws[size_t(law)];
        if (own.first.empty()) {
            own.first.assign(ROOM, 0.0);
            add_next(own.own, ROOT, 1.0, own.first.data());
        }
        return own.first.data();
    }

    // A cold head whose next byte is its first: the boundary law tells about it.
    bool is_fresh(const Head& head) const { return head.law < 0 && has_boundary && head.start == int64_t(text.size()); }

    // What the boundary law adds up to for a fresh head: bytes that go on in a longer token count less.
    double boundary_sum(const Head& head) const {
        double longer[4] = {};  // one would wait for every addition
        int32_t to = spec.first_child[head.node];
        const int32_t end = spec.first_child[head.node + 1];
        for (; to + 4 <= end; to += 4)
            for (int k = 0; k < 4; k++) longer[k] += boundary[spec.byte[to + k]];
        for (; to < end; to++) longer[0] += boundary[spec.byte[to]];
        return 1 - (1 - spec.split_discount) * ((longer[0] + longer[1]) + (longer[2] + longer[3]));
    }

    // Moves head i one byte down; its offspring go to the end. False when nothing longer is left to wait for.
    bool move(size_t i, int byte, int64_t end) {
        const int32_t to = child(heads[i].node, byte);
        if (to < 0) return false;
        const LawView law = laws[size_t(heads[i].law)].own;
        heads[i].node = to;
        for (int32_t at = spec.low[to]; at < spec.longer[to]; at++) {
            const double p = law.wide ? static_cast<const double*>(law.probabilities)[at]
                                      : double(static_cast<const float*>(law.probabilities)[at]);
            const double weight = heads[i].weight * p;
            if (!(weight > 0)) continue;
            arena.push_back({heads[i].history, int32_t(spec.order[at])});
            heads.push_back({next_key++, end, heads[i].length + 1, weight, 1.0, int32_t(arena.size() - 1), -1, to});
        }
        heads[i].pending = pending(law, to);
        return heads[i].pending > 0;
    }

    void settle() {
        const double sum = total();
        if (sum > 0) {
            for (auto& head : heads) head.weight /= sum;
        } else {
            lost = true;
            heads.clear();
        }
    }

    void give_up(const std::vector<int64_t>& keys) {
        const double sum = total();
        for (int64_t key : keys) {
            const size_t i = index_of(key);
            retired += (1 - retired) * heads[i].mass() / sum;
            heads.erase(heads.begin() + int64_t(i));
        }
    }

    void retire() {
        if (spec.window < 0 || lost) return;
        const int64_t horizon = int64_t(text.size()) - spec.window;
        std::vector<int64_t> old;
        for (auto& head : heads)
            if (head.law < 0 && head.start <= horizon) old.push_back(head.key);
        if (!old.empty()) {
            for (int i : due()) old.erase(std::remove(old.begin(), old.end(), heads[size_t(i)].key), old.end());
            give_up(old);
        }
        if (int64_t(heads.size()) > spec.max_heads) {
            std::vector<std::pair<double, int64_t>> light;
            for (auto& head : heads) light.emplace_back(head.mass(), head.key);
            std::stable_sort(light.begin(), light.end(), [](auto& a, auto& b) { return a.first < b.first; });
            std::vector<int64_t> keys;
            for (size_t i = 0; i + size_t(spec.max_heads) < light.size(); i++) keys.push_back(light[i].second);
            give_up(keys);
        }
    }
};

struct Sequence {
    std::vector<Group> groups;
    bool log_linear;
    int32_t chosen = -1;  // chosen, but not yet appended: a group needs its unshaped laws first

    int64_t experts() const {
        int64_t n = 0;
        for (auto& group : groups) n += group.spec.members;
        return n;
    }

    void mixed(double* out) {
        const double* laws[baseline::MAX_EXPERTS];
        double weights[baseline::MAX_EXPERTS];
        int64_t n = 0;
        for (auto& group : groups) {
            const double* law = group.law();
            if (group.spec.weight == 0 || std::all_of(law, law + SYMBOL_COUNT, [](double x) { return x == 0; })) continue;
            laws[n] = law;
            weights[n++] = group.spec.weight;
        }
        if (n == 0) std::fill(out, out + ROOM, 0.0);
        else TS_PICK(mix_bytes)(n, laws, weights, log_linear, out);
    }

    void add_shares(int symbol, double* shares) {
        double given[baseline::MAX_EXPERTS], sum = 0;
        int64_t n = 0;
        for (auto& group : groups) {
            group.member_shares(symbol, given + n);
            const double mass = std::fabs(group.spec.weight) * group.law()[symbol];
            for (int64_t e = 0; e < group.spec.members; e++) sum += given[n + e] *= mass;
            n += group.spec.members;
        }
        for (int64_t e = 0; e < n; e++) shares[e] += sum > 0 ? given[e] / sum : 1.0 / double(n);
    }

    void walk(WalkView& io) {
        io.count = io.symbols = 0;
        io.certificate = 0;
        std::fill(io.shares, io.shares + experts(), 0.0);
        for (;;) {
            if (chosen < 0) {
                io.status = NEEDS_FORWARD;
                for (auto& group : groups)
                    if (group.is_due()) return;
                io.status = LIMIT;
                if (io.count == io.max_bytes || (io.uniforms && io.symbols == io.uniform_count)) return;
                double law[ROOM];
                mixed(law);
                int symbol = choose(law, io);
                io.symbol = symbol;
                if (symbol < 0) {
                    io.status = NOTHING_FOLLOWS;
                    return;
                }
                io.log_probs[io.symbols++] = law[symbol] > 0 ? std::log(law[symbol]) : -baseline::INF_D;
                for (auto& group : groups) io.certificate = std::max(io.certificate, group.certificate());
                add_shares(symbol, io.shares);
                if (symbol == END) {
                    io.status = ENDED;
                    return;
                }
                chosen = symbol;
                for (auto& group : groups)
                    if (!group.lost && !group.reaches(symbol)) {
                        io.status = NEEDS_UNSHAPED;
                        return;
                    }
            }
            for (auto& group : groups)
                if (!group.lost) group.advance(chosen);
            io.bytes[io.count++] = uint8_t(chosen);
            chosen = -1;
            if (io.max_tokens > 0) {
                int64_t fewest = std::numeric_limits<int64_t>::max();
                for (auto& group : groups)
                    if (!group.lost) fewest = std::min(fewest, group.own_tokens());
                if (fewest >= io.max_tokens && fewest < std::numeric_limits<int64_t>::max()) {
                    io.status = LIMIT;
                    return;
                }
            }
        }
    }

private:
    // Index of the chosen symbol, -1 when the law is all zeros.
    static int choose(const double* law, const WalkView& io) {
        if (std::all_of(law, law + SYMBOL_COUNT, [](double x) { return x == 0; })) return -1;
        if (io.script) return io.script[io.symbols];
        if (!io.uniforms) return int(std::find(law, law + SYMBOL_COUNT, TS_PICK(most_of)(law)) - law);
        double cumulative[SYMBOL_COUNT], sum = 0;
        for (int s = 0; s < SYMBOL_COUNT; s++) cumulative[s] = sum += law[s];
        const double target = io.uniforms[io.symbols] * sum;
        int s = int(std::upper_bound(cumulative, cumulative + SYMBOL_COUNT, target) - cumulative);
        if (s < SYMBOL_COUNT && law[s] > 0) return s;
        for (s = SYMBOL_COUNT - 1; law[s] == 0;) s--;
        return s;
    }
};

Law make_law(const LawView* own, int64_t members, const LawView* member_laws) {
    return {*own, std::vector<LawView>(member_laws, member_laws + members), {}};
}

HeadView view(const Head& head, int64_t group) {
    return {head.key, head.start, head.length, head.weight, head.history, head.law, head.node, int32_t(group)};
}

}  // namespace

TS_API void* ts_sequence_new(int64_t groups, const GroupSpec* specs, int32_t log_linear) {
    auto* sequence = new Sequence;
    for (int64_t g = 0; g < groups; g++) sequence->groups.emplace_back(specs[g]);
    sequence->log_linear = log_linear != 0;
    return sequence;
}

TS_API void ts_sequence_free(void* sequence) { delete static_cast<Sequence*>(sequence); }

#define TS_GROUP (static_cast<Sequence*>(sequence)->groups[size_t(group)])

// Heads of a group: 0 all of them, 1 the cold ones, heaviest first. Returns their number.
TS_API int64_t ts_heads(void* sequence, int64_t group, int32_t which, HeadView* out, int64_t room) {
    const Group& own = TS_GROUP;
    std::vector<int> chosen;
    if (which == 0)
        for (size_t i = 0; i < own.heads.size(); i++) chosen.push_back(int(i));
    else
        chosen = own.cold();
    for (size_t i = 0; i < chosen.size() && int64_t(i) < room; i++) out[i] = view(own.heads[size_t(chosen[i])], group);
    return int64_t(chosen.size());
}

// Cold heads of every group that its law cannot do without, heaviest first. Returns their number.
TS_API int64_t ts_due(void* sequence, HeadView* out, int64_t room) {
    int64_t count = 0, group = 0;
    for (const Group& own : static_cast<Sequence*>(sequence)->groups) {
        for (int i : own.due())
            if (count++ < room) out[count - 1] = view(own.heads[size_t(i)], group);
        group++;
    }
    return count;
}

TS_API int64_t ts_history(void* sequence, int64_t group, int32_t history, int32_t* out, int64_t room) {
    return TS_GROUP.history(history, out, room);
}

// Puts a law into a slot (the laws' memory is the caller's and must outlive its use) ...
TS_API void ts_put_law(void* sequence, int64_t group, int32_t slot, const LawView* own, int64_t members,
                       const LawView* member_laws) {
    TS_GROUP.put(size_t(slot), make_law(own, members, member_laws));
}

// ... and gives the law in a slot to a cold head.
TS_API void ts_feed(void* sequence, int64_t group, int64_t key, int32_t slot) { TS_GROUP.feed(key, slot); }

// The slots whose laws heads have, each once, to out: [room]. Returns how many there are.
TS_API int64_t ts_used_laws(void* sequence, int64_t group, int32_t* out, int64_t room) {
    int64_t count = 0;
    std::vector<bool> used(TS_GROUP.laws.size());
    for (const Head& head : TS_GROUP.heads)
        if (head.law >= 0 && !used[size_t(head.law)]) {
            used[size_t(head.law)] = true;
            if (count++ < room) out[count - 1] = head.law;
        }
    return count;
}

TS_API void ts_group_law(void* sequence, int64_t group, double* out) {
    const double* law = TS_GROUP.law();
    std::copy(law, law + SYMBOL_COUNT, out);
}

// What each member of a group gave of a symbol's probability, unnormalised: [members].
TS_API void ts_member_masses(void* sequence, int64_t group, int32_t symbol, double* out) {
    TS_GROUP.member_masses(symbol, out);
}

TS_API int32_t ts_reaches(void* sequence, int64_t group, int32_t byte) { return TS_GROUP.reaches(byte); }

TS_API void ts_advance(void* sequence, int64_t group, int32_t byte) { TS_GROUP.advance(byte); }

TS_API void ts_group_view(void* sequence, int64_t group, GroupView* out) {
    const Group& own = TS_GROUP;
    const Head* best = own.best();
    *out = {own.certificate(), own.retired, int64_t(own.heads.size()), best ? best->length : 0, best ? best->history : -1,
            own.lost};
}

// Walks every sequence until it needs a forward, ends, or reaches a limit.
TS_API void ts_walk(int64_t count, void* const* sequences, WalkView* const* views) {
    for (int64_t i = 0; i < count; i++) static_cast<Sequence*>(sequences[i])->walk(*views[i]);
}
