// unif2ace_native::moe_route and its backward: on the CPU over the tiles of route.h, on CUDA by the launches
// of route.cu and route_backward.cu.
//
// On the CPU tokens are taken in chunks whose number no thread count changes, so that sums have one order: a chunk's
// choices and partial sums in parallel, the chunks' running counts one after the other, then each chunk places its
// slots.
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/torch_stable.h"
#include "moe/order.h"
#include "moe/route.h"
#include "moe/route_cuda.h"
#include "moe/tiles.h"

namespace unif2ace {
namespace {

constexpr int64_t kChunk = 16 * kLanes;  // tokens

template <class Real>
UNIF2ACE_SIMD_CLONES void choose(const Router<Real>& router, Tile<Real>& tile, Real* sums) {
  add_shares(router, tile, choose_tile(router, tile), sums);
}
template <class Real>
UNIF2ACE_SIMD_CLONES void slopes(const Router<Real>& router, const Cotangent<Real>& given, const int64_t* expert,
                                 int64_t t, Tile<Real>& tile) {
  backward_tile(router, given, expert, t, tile);
}

// Calls run(pointer to T) with the element type of `dtype`.
template <class Run>
void with_int(ScalarType dtype, const char* name, const Run& run) {
  switch (dtype) {
    case ScalarType::Long: return run(static_cast<int64_t*>(nullptr));
    case ScalarType::Int: return run(static_cast<int32_t*>(nullptr));
    case ScalarType::Short: return run(static_cast<int16_t*>(nullptr));
    case ScalarType::Char: return run(static_cast<int8_t*>(nullptr));
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Byte, name, ": expected int64, int32, int16, int8 or uint8");
      return run(static_cast<uint8_t*>(nullptr));
  }
}

// Group of each token, as int64 without strides.
std::vector<int64_t> read_groups(const Tensor& group_ids, int64_t tokens, int64_t groups) {
  STD_TORCH_CHECK(group_ids.dim() == 1 && group_ids.size(0) == tokens, "group_ids: expected one for each token");
  std::vector<int64_t> ids(static_cast<size_t>(tokens));
  with_int(group_ids.scalar_type(), "group_ids", [&](auto* of) {
    const auto* const from = static_cast<const std::remove_pointer_t<decltype(of)>*>(group_ids.const_data_ptr());
    const int64_t stride = group_ids.stride(0);
    for (int64_t t = 0; t < tokens; ++t) ids[t] = static_cast<int64_t>(from[t * stride]);
  });
  const bool in_range = std::all_of(ids.begin(), ids.end(), [&](int64_t id) { return 0 <= id && id < groups; });
  STD_TORCH_CHECK(in_range, "group_ids: expected values in [0, ", groups, ")");
  return ids;
}

template <class Real>
Router<Real> make_router(const Tensor& logits, const std::vector<int64_t>& group_sizes, int64_t top_k, int64_t shared,
                         bool normalize, const std::string& scoring, double z_coef) {
  Router<Real> router{{0}, {}, top_k, shared, normalize, scoring == "softmax", z_coef != 0};
  STD_TORCH_CHECK(!group_sizes.empty() && shared >= 0 && top_k >= 1, "group_sizes, shared, top_k: out of range");
  STD_TORCH_CHECK(router.softmax || scoring == "sigmoid", "scoring: unknown name ", scoring);
  for (const int64_t size : group_sizes) {
    STD_TORCH_CHECK(size >= top_k, "top_k: expected at most the smallest group");
    router.first.push_back(router.first.back() + size);
  }
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) == router.routed(), "logits: expected a column for each expert");
  return router;
}

template <class Real>
void read_floats(const Tensor& from, const char* name, std::vector<Real>& to) {
  dispatch(from.scalar_type(), name, [&](auto* of) {
    const auto* const data = static_cast<const std::remove_pointer_t<decltype(of)>*>(from.const_data_ptr());
    for (int64_t i = 0; i < static_cast<int64_t>(to.size()); ++i) to[i] = widen<Real>(data[i * from.stride(0)]);
  });
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Real, class Logit>
Outputs route(const Tensor& logits, const std::vector<int64_t>& ids, const Router<Real>& router,
              const std::vector<double>& coef, double z_coef) {
  constexpr ScalarType kind = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t tokens = logits.size(0), slots = router.slots(), experts = router.experts(), routed = router.routed();
  const auto make = [&](std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(logits, shape, dtype);
  };
  Tensor weight = make({tokens, slots}, kind), expert = make({tokens, slots}, ScalarType::Long);
  Tensor counts = make({experts}, ScalarType::Long), offsets = make({experts + 1}, ScalarType::Long);
  Tensor order = make({tokens * slots}, ScalarType::Long);
  Tensor frequency = make({routed}, kind), probability = make({routed}, kind);
  Tensor balance = make({}, kind), z = make({}, kind);

  const auto* const from = static_cast<const Logit*>(logits.const_data_ptr());
  const int64_t stride_t = logits.stride(0), stride_e = logits.stride(1);
  auto* const weights = static_cast<Real*>(weight.mutable_data_ptr());
  auto* const chosen = static_cast<int64_t*>(expert.mutable_data_ptr());
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<int64_t> places(chunks * experts);  // slots of each expert in the chunk
  std::vector<Real> shares(chunks * routed), squares(chunks);
  for_chunks_of(kChunk, tokens, [&](int64_t begin, int64_t end) {
    Tile<Real> tile(router);
    std::vector<Real> sums(routed * kLanes);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = std::min(tokens, (chunk + 1) * kChunk);
      int64_t* const count = places.data() + chunk * experts;
      std::fill(sums.begin(), sums.end(), Real(0));
      Real square = 0;
      for (int64_t t = chunk * kChunk; t < last; t += kLanes) {
        tile.tokens = std::min(kLanes, last - t);
        load_tile(router, ids.data() + t, from + t * stride_t, stride_t, stride_e, tile);
        choose(router, tile, sums.data());
        for (int64_t l = 0; l < tile.tokens; ++l) {
          const int64_t slot = (t + l) * slots;
          for (int64_t k = 0; k < router.top_k; ++k) {
            const int64_t n = tile.best[k * kLanes + l];
            weights[slot + k] = tile.score[n * kLanes + l] / tile.total[l];
            chosen[slot + k] = tile.first[l] + n;
          }
          for (int64_t s = 0; s < router.shared; ++s) {
            weights[slot + router.top_k + s] = 1;
            chosen[slot + router.top_k + s] = routed + router.shared * tile.group[l] + s;
          }
          for (int64_t s = slot; s < slot + slots; ++s) ++count[chosen[s]];
          if (router.with_z) square += tile.lse[l] * tile.lse[l];
        }
      }
      for (int64_t e = 0; e < routed; ++e) {
        Real sum = 0;
        for (int64_t l = 0; l < kLanes; ++l) sum += sums[e * kLanes + l];
        shares[chunk * routed + e] = sum;
      }
      squares[chunk] = square;
    }
  });

  auto* const count = static_cast<int64_t*>(counts.mutable_data_ptr());
  place_slots(chosen, tokens * slots, kChunk * slots, experts, places, count,
              static_cast<int64_t*>(offsets.mutable_data_ptr()), static_cast<int64_t*>(order.mutable_data_ptr()));

  auto* const f = static_cast<Real*>(frequency.mutable_data_ptr());
  auto* const p = static_cast<Real*>(probability.mutable_data_ptr());
  double loss = 0, square = 0;
  for (int64_t g = 0; g < router.groups(); ++g) {
    int64_t in_group = 0;  // slots: K for each token
    for (int64_t e = router.first[g]; e < router.first[g + 1]; ++e) in_group += count[e];
    const double in_all = std::max<double>(1, static_cast<double>(in_group / router.top_k));
    double sum = 0;
    for (int64_t e = router.first[g]; e < router.first[g + 1]; ++e) {
      double share = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) share += shares[chunk * routed + e];
      f[e] = static_cast<Real>(static_cast<double>(count[e] * router.size(g)) / (router.top_k * in_all));
      p[e] = static_cast<Real>(share / in_all);
      sum += static_cast<double>(f[e]) * p[e];
    }
    loss += coef[g] * sum;
  }
  for (const Real each : squares) square += each;
  *static_cast<Real*>(balance.mutable_data_ptr()) = static_cast<Real>(loss);
  *static_cast<Real*>(z.mutable_data_ptr()) =
      static_cast<Real>(z_coef * square / static_cast<double>(std::max<int64_t>(tokens, 1)));
  return {weight, expert, counts, offsets, order, frequency, probability, balance, z};
}

Outputs route_cpu(const Tensor& logits, const Tensor& group_ids, std::vector<int64_t> group_sizes, int64_t top_k,
                  int64_t shared, std::vector<double> balance_coef, bool normalize, std::string scoring,
                  std::optional<Tensor> selection_bias, double z_coef) {
  STD_TORCH_CHECK(balance_coef.size() == group_sizes.size(), "balance_coef: expected one for each group");
  std::optional<Outputs> outputs;
  dispatch(logits.scalar_type(), "logits", [&](auto* of) {
    using Logit = std::remove_pointer_t<decltype(of)>;
    using Real = ComputeOf<Logit>;
    Router<Real> router = make_router<Real>(logits, group_sizes, top_k, shared, normalize, scoring, z_coef);
    if (selection_bias) {
      STD_TORCH_CHECK(selection_bias->dim() == 1 && selection_bias->size(0) == router.routed(),
                      "selection_bias: expected one for each expert");
      router.bias.resize(router.routed());
      read_floats(*selection_bias, "selection_bias", router.bias);
    }
    outputs = route<Real, Logit>(logits, read_groups(group_ids, logits.size(0), router.groups()), router, balance_coef,
                                 z_coef);
  });
  return *outputs;
}

template <class Real, class Logit>
void route_backward(const Router<Real>& router, const Cotangent<Real>& given, const Tensor& logits,
                    const std::vector<int64_t>& ids, const int64_t* expert, Logit* to) {
  const auto* const from = static_cast<const Logit*>(logits.const_data_ptr());
  const int64_t tokens = logits.size(0), stride_t = logits.stride(0), stride_e = logits.stride(1);
  for_chunks_of(kChunk, tokens, [&](int64_t begin, int64_t end) {
    Tile<Real> tile(router);
    for (int64_t t = begin * kChunk; t < std::min(tokens, end * kChunk); t += kLanes) {
      tile.tokens = std::min(kLanes, tokens - t);
      load_tile(router, ids.data() + t, from + t * stride_t, stride_t, stride_e, tile);
      slopes(router, given, expert, t, tile);
      for (int64_t l = 0; l < tile.tokens; ++l) {
        Logit* const row = to + (t + l) * router.routed();
        const int64_t size = router.size(tile.group[l]);
        std::fill(row, row + tile.first[l], Logit{});
        for (int64_t n = 0; n < size; ++n) row[tile.first[l] + n] = narrow<Logit>(tile.other[n * kLanes + l]);
        std::fill(row + tile.first[l] + size, row + router.routed(), Logit{});
      }
    }
  });
}

Tensor route_backward_cpu(std::optional<Tensor> grad_weight, std::optional<Tensor> grad_probability,
                          std::optional<Tensor> grad_balance_loss, std::optional<Tensor> grad_z_loss,
                          const Tensor& logits, const Tensor& group_ids, const Tensor& expert, const Tensor& counts,
                          std::vector<int64_t> group_sizes, int64_t top_k, std::vector<double> balance_coef,
                          bool normalize, std::string scoring, double z_coef) {
  const int64_t tokens = logits.size(0), slots = expert.size(1), groups = static_cast<int64_t>(group_sizes.size());
  STD_TORCH_CHECK(expert.scalar_type() == ScalarType::Long && expert.is_contiguous() && expert.size(0) == tokens &&
                      slots >= top_k,
                  "expert: expected contiguous int64 [T, S]");
  STD_TORCH_CHECK(balance_coef.size() == group_sizes.size(), "balance_coef: expected one for each group");
  Tensor grad = torch::stable::new_empty(logits, {tokens, logits.size(1)});
  dispatch(logits.scalar_type(), "logits", [&](auto* of) {
    using Logit = std::remove_pointer_t<decltype(of)>;
    using Real = ComputeOf<Logit>;
    constexpr ScalarType kind = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
    const Router<Real> router = make_router<Real>(logits, group_sizes, top_k, slots - top_k, normalize, scoring,
                                                  grad_z_loss ? z_coef : 0.0);
    STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Long && counts.is_contiguous() &&
                        counts.numel() == router.experts(),
                    "counts: expected contiguous int64, one for each expert");
    const std::vector<int64_t> ids = read_groups(group_ids, tokens, groups);
    const auto* const chosen = static_cast<const int64_t*>(expert.const_data_ptr());
    bool is_own = true;
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t k = 0; k < top_k; ++k)
        is_own &= router.first[ids[t]] <= chosen[t * slots + k] && chosen[t * slots + k] < router.first[ids[t] + 1];
    STD_TORCH_CHECK(is_own, "expert: expected those of the token's group");
    const auto scalar = [&](const std::optional<Tensor>& given) {
      std::vector<Real> value(1);
      if (given) {
        STD_TORCH_CHECK(given->scalar_type() == kind && given->numel() == 1, "gradients: expected the outputs' dtype");
        value[0] = *static_cast<const Real*>(given->const_data_ptr());
      }
      return value[0];
    };

    Cotangent<Real> given;
    if (grad_weight) {
      STD_TORCH_CHECK(grad_weight->scalar_type() == kind && grad_weight->dim() == 2 && grad_weight->size(0) == tokens &&
                          grad_weight->size(1) == slots,
                      "grad_weight: expected [T, S] of the weights' dtype");
      given.weight = static_cast<const Real*>(grad_weight->const_data_ptr());
      given.stride_t = grad_weight->stride(0);
      given.stride_s = grad_weight->stride(1);
    }
    if (grad_probability || grad_balance_loss) {
      given.share.assign(router.routed(), Real(0));
      if (grad_probability) {
        STD_TORCH_CHECK(grad_probability->dim() == 1 && grad_probability->size(0) == router.routed(),
                        "grad_probability: expected one for each expert");
        read_floats(*grad_probability, "grad_probability", given.share);
      }
      const auto* const count = static_cast<const int64_t*>(counts.const_data_ptr());
      for (int64_t g = 0; g < groups; ++g) {
        int64_t in_group = 0;
        for (int64_t e = router.first[g]; e < router.first[g + 1]; ++e) in_group += count[e];
        const Real in_all = static_cast<Real>(std::max<int64_t>(1, in_group / top_k));
        const Real scale = scalar(grad_balance_loss) * static_cast<Real>(balance_coef[g]) *
                           static_cast<Real>(router.size(g)) / (static_cast<Real>(top_k) * in_all);
        for (int64_t e = router.first[g]; e < router.first[g + 1]; ++e)
          given.share[e] = (given.share[e] + scale * static_cast<Real>(count[e])) / in_all;
      }
    }
    given.lse = scalar(grad_z_loss) * static_cast<Real>(2 * z_coef / static_cast<double>(std::max<int64_t>(tokens, 1)));
    route_backward<Real, Logit>(router, given, logits, ids, chosen, static_cast<Logit*>(grad.mutable_data_ptr()));
  });
  return grad;
}

#ifdef UNIF2ACE_WITH_CUDA
Number number_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return Number::f32;
    case ScalarType::BFloat16: return Number::bf16;
    case ScalarType::Half: return Number::f16;
    case ScalarType::Long: return Number::i64;
    case ScalarType::Int: return Number::i32;
    case ScalarType::Short: return Number::i16;
    case ScalarType::Char: return Number::i8;
    default: STD_TORCH_CHECK(dtype == ScalarType::Byte, name, ": expected another dtype"); return Number::u8;
  }
}

Strided strided(const Tensor& tensor, const char* name) {
  return {tensor.const_data_ptr(), number_of(tensor.scalar_type(), name), tensor.dim() > 0 ? tensor.stride(0) : 0,
          tensor.dim() > 1 ? tensor.stride(1) : 0};
}

RouteGroups make_groups(const Tensor& logits, const Tensor& group_ids, const std::vector<int64_t>& group_sizes,
                        const std::vector<double>& coef, int64_t top_k, int64_t shared, bool normalize,
                        const std::string& scoring) {
  const auto router = make_router<float>(logits, group_sizes, top_k, shared, normalize, scoring, 0);
  STD_TORCH_CHECK(coef.size() == group_sizes.size(), "balance_coef: expected one for each group");
  STD_TORCH_CHECK(router.groups() <= kMaxGroups, "group_sizes: expected at most ", kMaxGroups, " groups");
  STD_TORCH_CHECK(group_ids.dim() == 1 && group_ids.size(0) == logits.size(0),
                  "group_ids: expected one for each token");
  RouteGroups groups{static_cast<int>(router.groups()), static_cast<int>(top_k), static_cast<int>(shared), normalize,
                     router.softmax, {}, {}};
  for (int64_t g = 0; g < router.groups(); ++g) {
    groups.first[g + 1] = static_cast<int>(router.first[g + 1]);
    groups.coef[g] = static_cast<float>(coef[g]);
  }
  return groups;
}

Outputs route_cuda(const Tensor& logits, const Tensor& group_ids, std::vector<int64_t> group_sizes, int64_t top_k,
                   int64_t shared, std::vector<double> balance_coef, bool normalize, std::string scoring,
                   std::optional<Tensor> selection_bias, double z_coef) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const RouteGroups groups =
      make_groups(logits, group_ids, group_sizes, balance_coef, top_k, shared, normalize, scoring);
  const int64_t tokens = logits.size(0), slots = top_k + shared, routed = groups.routed(), experts = groups.experts();
  const int64_t blocks = route_blocks(tokens);
  const auto make = [&](std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::new_empty(logits, shape, dtype);
  };
  Tensor weight = make({tokens, slots}, ScalarType::Float), expert = make({tokens, slots}, ScalarType::Long);
  Tensor counts = make({experts}, ScalarType::Long), offsets = make({experts + 1}, ScalarType::Long);
  Tensor order = make({tokens * slots}, ScalarType::Long);
  Tensor frequency = make({routed}, ScalarType::Float), probability = make({routed}, ScalarType::Float);
  Tensor balance = make({}, ScalarType::Float), z = make({}, ScalarType::Float);
  Tensor block_counts = make({experts, blocks}, ScalarType::Int);
  Tensor block_sums = make({routed + 1, blocks}, ScalarType::Float), sums = make({routed + 1}, ScalarType::Float);
  const auto floats = [](Tensor& each) { return each.mutable_data_ptr<float>(); };
  const auto ints = [](Tensor& each) { return each.mutable_data_ptr<int64_t>(); };
  const RouteForward arguments{
      strided(logits, "logits"), strided(group_ids, "group_ids"),
      selection_bias ? strided(*selection_bias, "selection_bias") : Strided{}, tokens,
      static_cast<float>(z_coef / static_cast<double>(std::max<int64_t>(tokens, 1))), z_coef != 0, floats(weight),
      ints(expert), ints(counts), ints(offsets), ints(order), floats(frequency), floats(probability), floats(balance),
      floats(z), block_counts.mutable_data_ptr<int>(), floats(block_sums), floats(sums)};
  launch_route(arguments, groups, current_stream(logits));
  return {weight, expert, counts, offsets, order, frequency, probability, balance, z};
}

Tensor route_backward_cuda(std::optional<Tensor> grad_weight, std::optional<Tensor> grad_probability,
                           std::optional<Tensor> grad_balance_loss, std::optional<Tensor> grad_z_loss,
                           const Tensor& logits, const Tensor& group_ids, const Tensor& expert, const Tensor& counts,
                           std::vector<int64_t> group_sizes, int64_t top_k, std::vector<double> balance_coef,
                           bool normalize, std::string scoring, double z_coef) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const int64_t tokens = logits.size(0);
  const RouteGroups groups = make_groups(logits, group_ids, group_sizes, balance_coef, top_k, expert.size(1) - top_k,
                                         normalize, scoring);
  STD_TORCH_CHECK(expert.is_contiguous() && expert.size(0) == tokens, "expert: expected contiguous [T, S]");
  STD_TORCH_CHECK(counts.is_contiguous() && counts.numel() == groups.experts(), "counts: expected one for each expert");
  const auto numbers = [](const std::optional<Tensor>& given) {
    return given ? given->const_data_ptr<float>() : nullptr;
  };
  Tensor grad = torch::stable::new_empty(logits, {tokens, logits.size(1)});
  const RouteBackward arguments{
      grad_weight ? strided(*grad_weight, "grad_weight") : Strided{}, numbers(grad_probability),
      numbers(grad_balance_loss), z_coef != 0 ? numbers(grad_z_loss) : nullptr,
      grad_probability ? grad_probability->stride(0) : 0, strided(logits, "logits"), strided(group_ids, "group_ids"),
      expert.const_data_ptr<int64_t>(), counts.const_data_ptr<int64_t>(), tokens,
      static_cast<float>(z_coef / static_cast<double>(std::max<int64_t>(tokens, 1))), grad.mutable_data_ptr()};
  launch_route_backward(arguments, groups, current_stream(logits));
  return grad;
}
#endif

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "moe_route(Tensor logits, Tensor group_ids, int[] group_sizes, int top_k, int shared, float[] balance_coef,"
      " bool normalize, str scoring, Tensor? selection_bias, float z_coef)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moe_route_backward(Tensor? grad_weight, Tensor? grad_probability, Tensor? grad_balance_loss,"
      " Tensor? grad_z_loss, Tensor logits, Tensor group_ids, Tensor expert, Tensor counts, int[] group_sizes,"
      " int top_k, float[] balance_coef, bool normalize, str scoring, float z_coef) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&unif2ace::route_cpu));
  m.impl("moe_route_backward", TORCH_BOX(&unif2ace::route_backward_cpu));
}

#ifdef UNIF2ACE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&unif2ace::route_cuda));
  m.impl("moe_route_backward", TORCH_BOX(&unif2ace::route_backward_cuda));
}
#endif
