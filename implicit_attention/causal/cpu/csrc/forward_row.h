// One row, with all rows before it known: sweeps over its weights on its own column.
//
// With a the attention to all other columns, y_h = (1 - p_h) a_h + p_h v_h. The linear part of the query map is applied by
// head, so that a query is q_0 + sum_h p_h q_h, and a sweep costs H D products.
#pragma once

#include "forward.h"

namespace implicit_attention::CAPABILITY {

template <class T>
bool ForwardSample<T>::settle_row(int64_t s, int64_t i) {
  weigh_others(s, i);
  t.most = 0;
  for (int64_t g = 0; g < z.groups; ++g) combine_others(g, s, i);
  if (!iterate(s, i)) return false;
  finish(s, i);
  return true;
}

// The row's weights on what came before the R rows, and on those of them that precede it; its own is left out.
template <class T>
void ForwardSample<T>::weigh_others(int64_t s, int64_t i) {
  typedef Vector<T> V;
  for (int64_t h = 0; i > 0 && h < z.heads; ++h) {
    const T* q = t.queries + h / z.shared * R * z.padded;
    const T* queries[] = {q, q + z.padded, q + 2 * z.padded, q + 3 * z.padded};
    T scores[R];
    dots<R>(key_row(h, s + i), queries, z.dim, scores);
    for (int64_t j = 0; j < i; ++j)
      t.pairs[j * z.hvec + h] = scores[j] + (a.bias == nullptr ? T(0) : bias_row(h, s + i)[s + j]);
  }
  for (int64_t h = 0; h < z.hvec; h += kLanes<T>) {
    const V old = load(&lse_of(h, s + i));
    V peak = old;
    for (int64_t j = 0; j < i; ++j) {
      const V score = load(t.pairs + j * z.hvec + h);
      peak = score > peak ? score : peak;
    }
    peak = peak == -kInfinity<T> ? V{} : peak;
    const V before = exponential(old - peak);
    V p[R], total = before;
    for (int64_t j = 0; j < i; ++j) total += p[j] = exponential(load(t.pairs + j * z.hvec + h) - peak);
    const V inverse = total == 0 ? V{} : 1 / total;
    store(t.share + h, before * inverse);
    for (int64_t j = 0; j < i; ++j) store(t.mix + j * z.hvec + h, p[j] * inverse);
    store(t.peak + h, peak);
    store(t.total + h, total);
  }
  for (int64_t h = 0; h < z.heads; ++h) {
    const T bias = own_bias(h, s + i), rest = t.total[h];
    t.others_lse[h] = rest == 0 ? -kInfinity<T> : t.peak[h] + std::log(rest);
    t.offset[h] = bias == -kInfinity<T> ? bias : bias - t.others_lse[h];
    for (int64_t j = 0; a.keep != nullptr && j < i; ++j) t.mix[j * z.hvec + h] *= keep_of(h, s + i, s + j);
  }
}

// Attention to all other columns in a group's heads; the vectors that its queries are combinations of.
template <class T>
void ForwardSample<T>::combine_others(int64_t g, int64_t s, int64_t i) {
  T* first = own_row(g, 0);
  copy(first, t.fixed + (g * R + i) * z.padded, z.padded);
  for (int64_t h = 0; h < z.heads; ++h) {
    const T *before = made_before(g, i) + h * z.padded, *own = made_value(g, i) + h * z.padded;
    T* change = own_row(g, 1 + h);
    const T share = t.share[h], keep = keep_of(h, s + i, s + i);
    for (int64_t k = 0; k < z.padded; k += kLanes<T>) {
      Vector<T> others = share * load(before + k);
      for (int64_t j = 0; j < i; ++j) others += t.mix[j * z.hvec + h] * load(made_value(g, j) + h * z.padded + k);
      store(first + k, load(first + k) + others);
      store(change + k, keep * load(own + k) - others);
    }
  }
  heads_of(g, [&](int64_t h) {
    T *others = t.others + h * z.padded, *change = t.change + h * z.padded, *key = t.key + h * z.padded;
    const T keep = keep_of(h, s + i, s + i), *own = value_rows(g, s + i);
    for (int64_t k = 0; k < z.padded; k += kLanes<T>) {
      Vector<T> total = t.share[h] * load(before_row(h, s + i) + k);
      for (int64_t j = 0; j < i; ++j) total += t.mix[j * z.hvec + h] * load(value_rows(g, s + j) + k);
      store(others + k, total);
      store(change + k, keep * load(own + k) - total);
    }
    t.reach[h] = largest_modulus<T>(change, z.dim);
    t.most = larger(t.most, t.reach[h] + largest_modulus<T>(others, z.dim));
    copy(key, key_row(h, s + i), z.padded);
    if (a.cosine != nullptr) {
      const int64_t at = b * a.turn_b + row_of(s + i) * (z.dim / 2);
      turn_back(key, a.cosine + at, a.sine + at, z.dim / 2);
    }
    for (int64_t k = 0; a.norm_weight != nullptr && k < z.dim; ++k) key[k] *= a.norm_weight[k];
  });
}

// A group's query at own weights p, before norm and rotation; returns its square.
template <class T>
inline T ForwardSample<T>::query_at(int64_t g, const T* p, T* q) {
  const T* own = own_row(g, 0);
  Vector<T> square{};
  for (int64_t k = 0; k < z.padded; k += kLanes<T>) {
    Vector<T> total = load(own + k);
    for (int64_t h = 0; h < z.heads; ++h) total += p[h] * load(own + (1 + h) * z.padded + k);
    square += total * total;
    store(q + k, total);
  }
  return sum<T>(square);
}

// The map for the own weights of row i: next = sigmoid(score(p) + offset). Its queries at p stay in `t.queries`, their scores
// in `t.scores_at`.
template <class T>
void ForwardSample<T>::evaluate(int64_t i, const T* p, T* next) {
  for (int64_t g = 0; g < z.groups; ++g) {
    T* q = t.queries + (g * R + i) * z.padded;
    const T square = query_at(g, p, q);
    heads_of(g, [&](int64_t h) {
      t.squares[h] = square;
      t.scores_at[h] = dot<T>(t.key + h * z.padded, q, z.padded);
    });
  }
  for (int64_t h = 0; a.inverse != nullptr && h < z.hvec; ++h)
    t.scores_at[h] /= std::sqrt(t.squares[h] / T(z.dim) + T(a.eps));
  for (int64_t h = 0; h < z.hvec; h += kLanes<T>) {
    const Vector<T> x = load(t.scores_at + h) + load(t.offset + h), e = exponential(-modulus(x));
    store(next + h, (x < 0 ? e : splat(T(1))) / (1 + e));
  }
}

// Settle the own weights, `t.p`, by sweeps from y = v; false if that fails. Within tolerance, sweeps go on to `kFiner` times
// less as long as each halves the residual. The row's equation is solved for the root that is wanted if sweeps contract slowly,
// or if the first three do not contract by half each, or end further than the third from where that came to: `rows.solve_rows`.
template <class T>
bool ForwardSample<T>::iterate(int64_t s, int64_t i) {
  if (a.own_score != nullptr) return given(s, i);
  T *p = t.p, *next = t.next, before = kInfinity<T>;
  for (int64_t h = 0; h < z.heads; ++h) p[h] = 1;
  evaluate(i, p, next);
  copy(p, next, z.hvec);
  T length = 0;  // how far the last plain sweep moved the weights; of the third, how far from there its root may be
  for (int64_t h = 0; h < z.heads; ++h) length = larger(length, 1 - p[h]);
  bool rooted = false, found = false, contracts = true;
  int64_t first = 1, last = kPatience;  // from where sweeps began to where slow ones end
  for (int64_t sweep = 1; sweep <= kForwardSweeps; ++sweep) {
    evaluate(i, p, next);
    T residual = 0, moved = 0, off = 0;
    for (int64_t h = 0; h < z.heads; ++h) {
      residual = larger(residual, std::abs(next[h] - p[h]) * t.reach[h]);
      moved = larger(moved, std::abs(next[h] - p[h]));
    }
    if (sweep <= 2) {  // these are plain
      contracts &= moved <= larger(length / 2, kRounding<T>);
      length = larger(moved, kRounding<T>);
      copy<T>(t.third, next, z.hvec);
    }
    for (int64_t h = 0; h < z.heads; ++h) off = larger(off, std::abs(t.third[h] - p[h]));
    t.sweeps[i] = sweep;
    if (!(residual < kInfinity<T>) || (rooted && !at_root())) return false;
    const bool done = within(i, residual), slow = sweep > last && !(residual <= T(a.slow) * before);
    const bool near = done && (rooted || (contracts && off <= length)), stays = found && 2 * residual > before;
    const bool finer = kFiner * residual <= T(a.atol) + T(a.rtol) * t.sizes[i];
    if (near && (finer || stays || rooted || sweep == kForwardSweeps)) return true;
    found = near;
    if ((done && !near) || slow || sweep == kForwardSweeps) {
      if (rooted || !own_root(s, i)) return false;
      rooted = true;
      first = sweep + 1;
      last = sweep + kPatience;
      before = kInfinity<T>;
      for (int64_t h = 0; h < z.heads; ++h) p[h] = T(t.root[h]);
    } else {
      before = residual;
      step(sweep > first && sweep <= last);
    }
  }
  return false;
}

// Move the own weights to what a sweep made of them; or, while sweeps contract, further along the line through the last two
// (Anderson's method of depth 1). Where they do not, that line can lead to a root that sweeps move away from.
template <class T>
void ForwardSample<T>::step(bool along) {
  T inner = 0, square = 0;
  for (int64_t h = 0; h < z.heads; ++h) {
    const T change = t.next[h] - t.p[h], differs = change - t.changes[h];
    inner += change * differs;
    square += differs * differs;
  }
  // The part to go back is r / (r - 1), where a sweep leaves r of the error: from -1 (1/2) to 0.8 (-4).
  const bool contracts = along && inner > -4 * square && 2 * inner < square;
  const T part = contracts ? inner / square : T(0);
  for (int64_t h = 0; h < z.heads; ++h) {
    const T p = t.p[h], next = t.next[h], found = next - part * (next - t.nexts[h]);
    t.changes[h] = next - p;
    t.nexts[h] = next;
    t.p[h] = found < 0 ? T(0) : found > 1 ? T(1) : found;
  }
}

// Own weights that do not depend on the output.
template <class T>
bool ForwardSample<T>::given(int64_t s, int64_t i) {
  T worst = 0;
  for (int64_t h = 0; h < z.heads; ++h) {
    const T score = t.scores_at[h] = a.own_score[(b * z.heads + h) * z.length + row_of(s + i)];
    t.p[h] = t.offset[h] == -kInfinity<T> ? T(0) : 1 / (1 + std::exp(-score - t.offset[h]));
    worst = larger(worst, t.p[h] * t.reach[h]);
  }
  for (int64_t g = 0; g < z.groups; ++g) query_at(g, t.p, t.queries + (g * R + i) * z.padded);
  t.sweeps[i] = 1;
  return worst < kInfinity<T> && within(i, T(0));
}

// Whether the own weights are at the root that was found.
template <class T>
bool ForwardSample<T>::at_root() {
  double off = 0;
  for (int64_t h = 0; h < z.heads; ++h) off = larger(off, std::abs(t.root[h] - double(t.p[h])));
  return off <= a.same_root;
}

// Whether a residual is within tolerance; if it may be, the row's outputs at p are made.
template <class T>
bool ForwardSample<T>::within(int64_t i, T residual) {
  if (!(residual <= T(a.atol) + T(a.rtol) * t.most)) return false;
  T size = 0;
  for (int64_t h = 0; h < z.heads; ++h) {
    T* y = t.outputs + (h * R + i) * z.padded;
    copy<T>(y, t.others + h * z.padded, z.padded);
    add<T>(y, t.change + h * z.padded, t.p[h], z.padded);
    size = larger(size, largest_modulus(y, z.dim));
  }
  t.errors[i] = residual;
  t.sizes[i] = size;
  return residual <= T(a.atol) + T(a.rtol) * size;
}

// Put the root of the row's equation that is wanted into `t.root`.
template <class T>
bool ForwardSample<T>::own_root(int64_t s, int64_t i) {
  const int64_t n = z.heads + 1;
  for (int64_t g = 0; a.inverse != nullptr && g < z.groups; ++g) {
    double* gram = t.solver.gram(g);
    for (int64_t h = 0; h < n; ++h)
      for (int64_t j = 0; j <= h; ++j)
        gram[h * n + j] = gram[j * n + h] = dot(own_row(g, h), own_row(g, j), z.dim) / T(z.dim);
    gram[0] += a.eps;
  }
  for (int64_t h = 0; h < z.heads; ++h) {
    const T* key = t.key + h * z.padded;
    t.solver.alpha()[h] = dot(key, own_row(h / z.shared, 0), z.dim);
    for (int64_t j = 0; j < z.heads; ++j)
      t.solver.beta()[h * z.heads + j] = dot(key, own_row(h / z.shared, 1 + j), z.dim);
    const double bias = own_bias(h, s + i), rest = t.total[h];
    t.solver.offset()[h] = bias == -kInfinity<double> ? bias
                           : rest == 0              ? kInfinity<double>
                                                    : bias - double(t.peak[h]) - std::log(rest);
  }
  return t.solver.solve(t.root);
}

// The queries and the log-sum-exp at the own weights that were found.
template <class T>
void ForwardSample<T>::finish(int64_t s, int64_t i) {
  for (int64_t g = 0; g < z.groups; ++g) {
    t.norms[g * R + i] = norm_and_turn(t.queries + (g * R + i) * z.padded, s + i);
  }
  for (int64_t h = 0; h < z.heads; ++h) {
    const T own = t.scores_at[h] + own_bias(h, s + i), others = t.others_lse[h], peak = std::max(own, others);
    t.whole[i * z.hvec + h] = peak == -kInfinity<T> ? peak : peak + std::log1p(std::exp(std::min(own, others) - peak));
  }
}

// Norm and rotate one query in place; returns what the norm multiplied it with.
template <class T>
T ForwardSample<T>::norm_and_turn(T* q, int64_t i) {
  T inverse = 1;
  if (a.inverse != nullptr) {
    inverse = 1 / std::sqrt(dot(q, q, z.dim) / T(z.dim) + T(a.eps));
    scale(q, inverse, z.dim);
    for (int64_t k = 0; a.norm_weight != nullptr && k < z.dim; ++k) q[k] *= a.norm_weight[k];
  }
  if (a.cosine != nullptr) {
    const int64_t at = b * a.turn_b + row_of(i) * (z.dim / 2);
    turn(q, a.cosine + at, a.sine + at, z.dim / 2);
  }
  return inverse;
}

}  // namespace implicit_attention::CAPABILITY
