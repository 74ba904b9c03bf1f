// The operators of a decoder layer as C++ functions; block.cpp joins them.
#pragma once

#include <tuple>

#include "common.h"

namespace herd {

std::tuple<Tensor, Tensor> rms_norm(Tensor x_ND, Tensor weight_D, double eps, bool narrow);
Tensor rotate(Tensor x_BTHK, Tensor cos_BTK, Tensor sin_BTK, double sign);
Tensor swiglu(Tensor gate, Tensor up);
std::vector<Tensor> qmatmul(Tensor x_ND, std::vector<Tensor> matrices, std::vector<int64_t> codes, int64_t path);
Tensor paged_attention(Tensor q_NHK, Tensor k_NGK, Tensor v_NGK, Tensor pool, Tensor tables, Tensor rows, int64_t layer);

}  // namespace herd
