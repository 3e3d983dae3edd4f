// The launchers of csrc/launchers.h without their kernels: a call costs what it costs up to the launch. With
// bindings.cpp and gpu.cu, benchmarks.host_cost measures the cuda backend with it on a machine without a GPU.
#include "../launchers.h"

namespace cnk {

void group_norm_silu_fwd(const Place&, const GroupNormForward&) {}
void group_norm_silu_bwd(const Place&, const GroupNormBackward&) {}
GroupNormFit group_norm_silu_fwd_fit(const Place&, Dtype, const GroupNormCut&) { return {0, 1}; }
GroupNormFit group_norm_silu_bwd_fit(const Place&, Dtype, const GroupNormCut&) { return {0, 1}; }

int zero_conv_fwd_tiles(Dtype, const ZeroConv&) { return 1; }
int zero_conv_dx_tiles(Dtype, const ZeroConv&) { return 1; }
int zero_conv_dweight_tiles(Dtype, const ZeroConv&) { return 1; }
void zero_conv_add_fwd(const Place&, Dtype, const std::vector<ZeroConv>&, int) {}
void zero_conv_add_bwd(const Place&, Dtype, const std::vector<ZeroConv>&, int) {}

void attention_fwd(const Place&, const Attention&) {}
void attention_bwd(const Place&, const Attention&) {}

}  // namespace cnk
