// The Python module. A plan fills a struct of csrc/launchers.h once: sizes, strides, the cut into blocks. A call gives
// that struct, the device and its current stream, and the addresses of its tensors in the order below; an absent tensor
// is 0. No PyTorch header, hence one build for every version of it. The same file makes cnkernels._C (nvcc) and the CPU
// execution that the tests load (g++, CNK_HOST).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "launchers.h"

#ifdef CNK_HOST
#include "host/execution.h"
#endif

namespace py = pybind11;
using namespace cnk;

namespace {

using Address = uintptr_t;

// Struct(field=value, ...) in Python; an unknown field is an AttributeError. Types are local to the module: both builds
// may be loaded in one process.
template <class S>
py::class_<S> bind_struct(py::module_& module, const char* name) {
  py::class_<S> type(module, name, py::module_local());
  type.def(py::init([type](const py::kwargs& fields) {
    S value{};
    py::object view = py::cast(&value, py::return_value_policy::reference);
    for (auto field : fields) {
      if (!py::hasattr(view, field.first))
        throw py::attribute_error(py::str(field.first).cast<std::string>() + " is no field of this struct");
      py::setattr(view, field.first, field.second);
    }
    return value;
  }));
  return type;
}

void bind_group_norm_silu(py::module_& module) {
  bind_struct<ChannelTensor>(module, "ChannelTensor")
      .def_readwrite("is_float", &ChannelTensor::is_float);
  bind_struct<GroupNormCut>(module, "GroupNormCut")
      .def_readwrite("samples", &GroupNormCut::samples)
      .def_readwrite("channels", &GroupNormCut::channels)
      .def_readwrite("positions", &GroupNormCut::positions)
      .def_readwrite("groups", &GroupNormCut::groups)
      .def_readwrite("span", &GroupNormCut::span)
      .def_readwrite("splits", &GroupNormCut::splits)
      .def_readwrite("threads", &GroupNormCut::threads)
      .def_readwrite("channels_last", &GroupNormCut::channels_last)
      .def_readwrite("vectors", &GroupNormCut::vectors)
      .def_readwrite("cluster", &GroupNormCut::cluster);
  bind_struct<GroupNormForward>(module, "GroupNormForward")
      .def_readwrite("dtype", &GroupNormForward::dtype)
      .def_readwrite("cut", &GroupNormForward::cut)
      .def_readwrite("weight", &GroupNormForward::weight)
      .def_readwrite("bias", &GroupNormForward::bias)
      .def_readwrite("addend", &GroupNormForward::addend)
      .def_readwrite("eps", &GroupNormForward::eps)
      .def_readwrite("silu", &GroupNormForward::silu);
  bind_struct<GroupNormBackward>(module, "GroupNormBackward")
      .def_readwrite("dtype", &GroupNormBackward::dtype)
      .def_readwrite("cut", &GroupNormBackward::cut)
      .def_readwrite("weight", &GroupNormBackward::weight)
      .def_readwrite("bias", &GroupNormBackward::bias)
      .def_readwrite("addend", &GroupNormBackward::addend)
      .def_readwrite("dweight", &GroupNormBackward::dweight)
      .def_readwrite("dbias", &GroupNormBackward::dbias)
      .def_readwrite("daddend", &GroupNormBackward::daddend)
      .def_readwrite("silu", &GroupNormBackward::silu);
  module.def("group_norm_silu_fwd",
             [](GroupNormForward call, int device, Address stream, Address x, Address y, Address mean, Address rstd,
                Address partial, Address weight, Address bias, Address addend) {
               call.x = x, call.y = y, call.mean = mean, call.rstd = rstd, call.partial = partial;
               call.weight.address = weight, call.bias.address = bias, call.addend.address = addend;
               group_norm_silu_fwd({device, stream}, call);
             });
  module.def("group_norm_silu_bwd",
             [](GroupNormBackward call, int device, Address stream, Address x, Address dy, Address dx, Address mean,
                Address rstd, Address partial, Address group_sums, Address channel_partial, Address weight,
                Address bias, Address addend, Address dweight, Address dbias, Address daddend) {
               call.x = x, call.dy = dy, call.dx = dx, call.mean = mean, call.rstd = rstd;
               call.partial = partial, call.group_sums = group_sums, call.channel_partial = channel_partial;
               call.weight.address = weight, call.bias.address = bias, call.addend.address = addend;
               call.dweight.address = dweight, call.dbias.address = dbias, call.daddend.address = daddend;
               group_norm_silu_bwd({device, stream}, call);
             });
  bind_struct<GroupNormFit>(module, "GroupNormFit")
      .def_readonly("shared_bytes", &GroupNormFit::shared_bytes)
      .def_readonly("clusters", &GroupNormFit::clusters);
  module.def("group_norm_silu_fwd_fit", &group_norm_silu_fwd_fit);
  module.def("group_norm_silu_bwd_fit", &group_norm_silu_bwd_fit);
  module.attr("GROUP_NORM_PORTABLE_THREADS") = kGroupNormPortableThreads;
  module.attr("GROUP_NORM_FWD_THREADS") = kGroupNormFwdThreads;
  module.attr("GROUP_NORM_BWD_THREADS") = kGroupNormBwdThreads;
}

void bind_zero_conv_add(py::module_& module) {
  bind_struct<ZeroConv>(module, "ZeroConv")
      .def_readwrite("samples", &ZeroConv::samples)
      .def_readwrite("in_channels", &ZeroConv::in_channels)
      .def_readwrite("out_channels", &ZeroConv::out_channels)
      .def_readwrite("positions", &ZeroConv::positions)
      .def_readwrite("channels_last", &ZeroConv::channels_last)
      .def_readwrite("out_sample", &ZeroConv::out_sample)
      .def_readwrite("out_channel", &ZeroConv::out_channel)
      .def_readwrite("out_position", &ZeroConv::out_position)
      .def_readwrite("scale_stride", &ZeroConv::scale_stride)
      .def_readwrite("depth_splits", &ZeroConv::depth_splits)
      .def_readwrite("splits", &ZeroConv::splits)
      .def_readwrite("sum_parts", &ZeroConv::sum_parts);
  module.def("zero_conv_fwd_tiles", &zero_conv_fwd_tiles);
  module.def("zero_conv_dx_tiles", &zero_conv_dx_tiles);
  module.def("zero_conv_dweight_tiles", &zero_conv_dweight_tiles);
  module.attr("ZERO_CONV_GROUP") = kZeroConvGroup;
  module.def("zero_conv_add_fwd",
             [](std::vector<ZeroConv> layers, Dtype dtype, int blocks, int device, Address stream,
                const std::vector<std::array<Address, 7>>& addresses, const std::vector<float>& factors) {
               for (size_t i = 0; i < layers.size(); ++i) {
                 ZeroConv& layer = layers[i];
                 std::tie(layer.x, layer.weight, layer.bias, layer.residual, layer.scale, layer.out,
                          layer.depth_partial) = std::tuple_cat(addresses.at(i));
                 layer.factor = factors.at(i);
               }
               zero_conv_add_fwd({device, stream}, dtype, layers, blocks);
             });
  module.def("zero_conv_add_bwd",
             [](std::vector<ZeroConv> layers, Dtype dtype, int blocks, int device, Address stream,
                const std::vector<std::array<Address, 12>>& addresses, const std::vector<float>& factors) {
               for (size_t i = 0; i < layers.size(); ++i) {
                 ZeroConv& layer = layers[i];
                 std::tie(layer.dout, layer.x, layer.weight, layer.bias, layer.scale, layer.dx, layer.dweight,
                          layer.dbias, layer.dscale, layer.dweight_partial, layer.dot_partial,
                          layer.channel_sums) = std::tuple_cat(addresses.at(i));
                 layer.factor = factors.at(i);
               }
               zero_conv_add_bwd({device, stream}, dtype, layers, blocks);
             });
}

void bind_attention(py::module_& module) {
  bind_struct<HeadTensor>(module, "HeadTensor")
      .def_readwrite("batch", &HeadTensor::batch)
      .def_readwrite("row", &HeadTensor::row)
      .def_readwrite("head", &HeadTensor::head);
  bind_struct<Attention>(module, "Attention")
      .def_readwrite("dtype", &Attention::dtype)
      .def_readwrite("batch", &Attention::batch)
      .def_readwrite("heads", &Attention::heads)
      .def_readwrite("q_length", &Attention::q_length)
      .def_readwrite("k_length", &Attention::k_length)
      .def_readwrite("head_dim", &Attention::head_dim)
      .def_readwrite("q", &Attention::q)
      .def_readwrite("k", &Attention::k)
      .def_readwrite("v", &Attention::v)
      .def_readwrite("out", &Attention::out)
      .def_readwrite("dout", &Attention::dout)
      .def_readwrite("dq", &Attention::dq)
      .def_readwrite("dk", &Attention::dk)
      .def_readwrite("dv", &Attention::dv);
  module.def("attention_fwd", [](Attention call, int device, Address stream, Address q, Address k, Address v, Address out,
                                 Address lse, float scale) {
    call.q.address = q, call.k.address = k, call.v.address = v, call.out.address = out;
    call.lse = lse, call.scale = scale;
    attention_fwd({device, stream}, call);
  });
  module.def("attention_bwd", [](Attention call, int device, Address stream, Address dout, Address q, Address k, Address v,
                                 Address out, Address lse, Address delta, Address dq, Address dk, Address dv,
                                 float scale) {
    call.dout.address = dout, call.q.address = q, call.k.address = k, call.v.address = v, call.out.address = out;
    call.dq.address = dq, call.dk.address = dk, call.dv.address = dv;
    call.lse = lse, call.delta = delta, call.scale = scale;
    attention_bwd({device, stream}, call);
  });
}

#ifdef CNK_HOST
// The kernels of the next calls may touch these (address, bytes) and nothing else.
void watch(const std::vector<std::pair<uintptr_t, size_t>>& tensors) {
  host::global_memory().clear();
  host::launches().clear();
  for (const auto& [address, bytes] : tensors) host::global_memory().add(address, bytes);
}

// The next launches are held to the limits of this compute capability; multiprocessors 0: as many as its GPU has.
void execute_as(int capability, int multiprocessors) {
  host::Architecture architecture = host::architecture_of(capability);
  if (multiprocessors > 0) architecture.multiprocessors = multiprocessors;
  host::architecture() = architecture;
}

// (op, blocks, threads, dynamic shared memory, cluster) of every launch since watch().
py::list launches() {
  py::list list;
  for (const auto& l : host::launches())
    list.append(py::make_tuple(l.name, l.blocks, l.threads, l.shared_bytes, l.cluster));
  return list;
}
#endif

}  // namespace

PYBIND11_MODULE(CNK_MODULE, module) {
  py::enum_<Dtype>(module, "Dtype", py::module_local())
      .value("float32", Dtype::float32)
      .value("float16", Dtype::float16)
      .value("bfloat16", Dtype::bfloat16);
  bind_struct<Place>(module, "Place").def_readwrite("device", &Place::device).def_readwrite("stream", &Place::stream);
  bind_struct<Limits>(module, "Limits")
      .def_readonly("capability", &Limits::capability)
      .def_readonly("multiprocessors", &Limits::multiprocessors)
      .def_readonly("shared_per_block", &Limits::shared_per_block)
      .def_readonly("max_cluster", &Limits::max_cluster);
  module.def("limits_of", &limits_of);
  module.def("why_unusable", &why_unusable);
  bind_group_norm_silu(module);
  bind_zero_conv_add(module);
  bind_attention(module);
#ifdef CNK_HOST
  module.def("watch", &watch);
  module.def("execute_as", &execute_as, py::arg("capability"), py::arg("multiprocessors") = 0);
  module.def("launches", &launches);
  module.attr("architectures") = "80;90a";  // which code of each kernel the CPU executes: that with clusters
#else
  module.attr("architectures") = CNK_ARCHITECTURES;
#endif
}
