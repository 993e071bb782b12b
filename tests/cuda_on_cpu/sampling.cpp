// csrc/sampling/draw.cu and remask.cu as they are, on fibers.
#include "sampling/draw.cu"
#include "sampling/remask.cu"

#include "cuda_on_cpu_python.h"

namespace {

using cuda_on_cpu::DeviceArray;
using Floats = DeviceArray<float>;
using Longs = DeviceArray<int64_t>;
using Bools = DeviceArray<bool>;

template <class In>
DeviceArray<In> converted(const Floats::Numpy& x) {
  auto out = DeviceArray<In>::empty({x.size()});
  for (pybind11::ssize_t i = 0; i < x.size(); ++i) out.data()[i] = static_cast<In>(x.data()[i]);
  return out;
}

// cond, uncond [R, V], uncond of no elements where there is one branch.
template <class In>
pybind11::tuple draw(unif2ace::LogitsType type, Floats::Numpy cond, Floats::Numpy uncond, Longs::Numpy ids,
                     Bools::Numpy unknown, Longs::Numpy rows, int64_t seed, int64_t offset, int64_t first_code,
                     int32_t codes, double guidance, double temperature, int32_t top_k, double top_p, int confidence) {
  auto device_cond = converted<In>(cond), device_uncond = converted<In>(uncond);
  Longs device_ids(ids), device_rows(rows), words = Longs::empty({2}), out_ids = Longs::empty({ids.size()});
  Bools device_unknown(unknown);
  Floats out_confidence = Floats::empty({ids.size()});
  words.data()[0] = seed;
  words.data()[1] = offset;
  unif2ace::DrawArguments a{};
  a.cond = device_cond.data() + first_code;
  a.uncond = uncond.size() == 0 ? nullptr : device_uncond.data() + first_code;
  a.cond_stride = a.uncond_stride = cond.shape(1);
  a.ids = device_ids.data(), a.rows = device_rows.data(), a.seed = words.data(), a.offset = words.data() + 1;
  a.unknown = device_unknown.data(), a.out_ids = out_ids.data(), a.out_confidence = out_confidence.data();
  a.count = ids.size(), a.first_code = first_code, a.codes = codes, a.top_k = top_k < codes ? top_k : 0;
  a.up = static_cast<float>(1 + guidance), a.down = static_cast<float>(guidance);
  a.inverse = temperature > 0 ? static_cast<float>(1 / temperature) : 0.0f;
  a.top_p = top_p, a.confidence = static_cast<unif2ace::Confidence>(confidence);
  unif2ace::launch_draw(type, a, nullptr);
  return pybind11::make_tuple(out_ids.numpy(), out_confidence.numpy());
}

}  // namespace

PYBIND11_MODULE(CUDA_ON_CPU_MODULE, m) {
  cuda_on_cpu::define(m);
  const auto define_draw = [&](const char* name, auto in, unif2ace::LogitsType type) {
    m.def(name, [type](Floats::Numpy cond, Floats::Numpy uncond, Longs::Numpy ids, Bools::Numpy unknown,
                       Longs::Numpy rows, int64_t seed, int64_t offset, int64_t first_code, int32_t codes,
                       double guidance, double temperature, int32_t top_k, double top_p, int confidence) {
      return draw<decltype(in)>(type, cond, uncond, ids, unknown, rows, seed, offset, first_code, codes, guidance,
                                temperature, top_k, top_p, confidence);
    });
  };
  define_draw("draw_float32", float(), unif2ace::LogitsType::kFloat);
  define_draw("draw_bfloat16", __nv_bfloat16(), unif2ace::LogitsType::kBFloat16);
  define_draw("draw_float16", __half(), unif2ace::LogitsType::kHalf);
  // The results of a function for each of several argument tuples: a process for all of them.
  m.def("each", [m](const char* name, const pybind11::list& calls) {
    pybind11::list results;
    for (const auto& call : calls) results.append(m.attr(name)(*pybind11::cast<pybind11::tuple>(call)));
    return results;
  });
  m.def("remask", [](Floats::Numpy confidence, Bools::Numpy unknown, Longs::Numpy count, Longs::Numpy rows,
                     int64_t seed, int64_t offset, float temperature, bool exact) {
    Floats device_confidence(confidence), device_temperature = Floats::empty({1});
    Bools device_unknown(unknown), mask = Bools::empty({confidence.shape(0), confidence.shape(1)});
    Longs device_count(count), device_rows(rows), words = Longs::empty({2});
    words.data()[0] = seed;
    words.data()[1] = offset;
    *device_temperature.data() = temperature;
    unif2ace::launch_remask(
        {device_confidence.data(), device_temperature.data(), device_unknown.data(), device_count.data(),
         device_rows.data(), words.data(), words.data() + 1, mask.data(), confidence.shape(0),
         static_cast<int32_t>(confidence.shape(1)), exact},
        nullptr);
    return mask.numpy();
  });
}
