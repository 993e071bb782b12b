// The gradient of routing in one launch, a token on 4 to 32 lanes: no sum goes beyond a token.
#include "moe/route_token.cuh"

namespace unif2ace {
namespace {

__device__ void store_float(void* to, Number type, int64_t i, float value) {
  switch (type) {
    case Number::bf16: static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16(value); break;
    case Number::f16: static_cast<__half*>(to)[i] = __float2half(value); break;
    default: static_cast<float*>(to)[i] = value;
  }
}

template <int kLanes, int kValues>
__global__ void __launch_bounds__(kThreads) backward_kernel(RouteBackward a, RouteGroups groups) {
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int routed = groups.first[groups.count], slots = groups.top_k + groups.shared;
  Token<kLanes, kValues> token;
  token.load(a.logits, a.group_ids, groups, t, t < a.tokens);
  token.scores(groups.softmax, false);
  float grad[kValues] = {};  // of the scores

  if (a.grad_balance != nullptr || a.grad_probability != nullptr) {
    int64_t counts[kValues], in_group = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      counts[v] = token.column(v) < token.size ? a.counts[token.first + token.column(v)] : 0;
      in_group += counts[v];
    }
    const int64_t in_all = sum_of_lanes<kLanes>(in_group) / groups.top_k;
    const float tokens = static_cast<float>(in_all > 0 ? in_all : 1);
    float scale = 0;
    if (a.grad_balance != nullptr)
      scale = *a.grad_balance * groups.coef[token.group] * static_cast<float>(token.size) /
              (static_cast<float>(groups.top_k) * tokens);
    float sum = 0, dot = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (token.column(v) >= token.size) continue;
      grad[v] = scale * static_cast<float>(counts[v]);
      if (a.grad_probability != nullptr)
        grad[v] += a.grad_probability[(token.first + token.column(v)) * a.stride_probability];
      grad[v] /= tokens;
      sum += token.score[v];
      dot += grad[v] * token.score[v];
    }
    if (!groups.softmax) {  // a share is a score over the sum of the scores
      sum = sum_of_lanes<kLanes>(sum) + kTinyFloat;
      dot = sum_of_lanes<kLanes>(dot) / sum;
#pragma unroll
      for (int v = 0; v < kValues; ++v) grad[v] = (grad[v] - dot) / sum;
    }
  }
  if (a.grad_weight.data != nullptr) {
    bool chosen[kValues] = {};
    float picked[kValues] = {}, sum = 0, dot = 0;
    for (int k = 0; token.active && k < groups.top_k; ++k) {
      const int64_t expert = a.expert[t * slots + k];
      const float value = load_float(a.grad_weight, t * a.grad_weight.stride0 + k * a.grad_weight.stride1);
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (token.first + token.column(v) != expert) continue;
        chosen[v] = true;
        picked[v] = value;
        sum += token.score[v];
        dot += value * token.score[v];
      }
    }
    if (groups.normalize) {
      sum = sum_of_lanes<kLanes>(sum) + kTinyFloat;
      dot = sum_of_lanes<kLanes>(dot) / sum;
    } else {
      sum = 1, dot = 0;
    }
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (chosen[v]) grad[v] += (picked[v] - dot) / sum;
    }
  }
  float dot = 0;
#pragma unroll
  for (int v = 0; v < kValues; ++v) dot += token.column(v) < token.size ? grad[v] * token.score[v] : 0.0f;
  dot = sum_of_lanes<kLanes>(dot);
#pragma unroll
  for (int v = 0; v < kValues; ++v)
    grad[v] = token.score[v] * (groups.softmax ? grad[v] - dot : grad[v] * (1.0f - token.score[v]));
  if (a.grad_z != nullptr) {
    float probability[kValues];
    token.softmax(probability);
    const float scale = *a.grad_z * 2.0f * a.z_scale * token.lse;
#pragma unroll
    for (int v = 0; v < kValues; ++v) grad[v] += scale * probability[v];
  }
  if (!token.active) return;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    if (token.column(v) < token.size)
      store_float(a.grad, a.logits.type, t * routed + token.first + token.column(v), grad[v]);
  }
  for (int c = token.place; c < routed; c += kLanes) {
    if (c < token.first || c >= token.first + token.size) store_float(a.grad, a.logits.type, t * routed + c, 0.0f);
  }
}

}  // namespace

void launch_route_backward(const RouteBackward& a, const RouteGroups& groups, cudaStream_t stream) {
  if (a.tokens == 0) return;
#define UNIF2ACE_BACKWARD(lanes, values)                                                                         \
  UNIF2ACE_LAUNCH((backward_kernel<lanes, values>),                                                              \
                  static_cast<unsigned>((a.tokens + kThreads / lanes - 1) / (kThreads / lanes)), kThreads, 0,    \
                  stream, a, groups)
  UNIF2ACE_FOR_WIDTH(widest_group(groups), UNIF2ACE_BACKWARD);
#undef UNIF2ACE_BACKWARD
}

}  // namespace unif2ace
