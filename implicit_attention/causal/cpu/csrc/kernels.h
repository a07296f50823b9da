// The kernels of one instruction set, and of all that are in this library.
#pragma once

#include "arguments.h"
#include "feedback_arguments.h"

namespace implicit_attention {

struct Kernels {
  void (*forward32)(const ForwardArguments<float>&);
  void (*forward64)(const ForwardArguments<double>&);
  void (*adjoint32)(const AdjointArguments<float>&);
  void (*adjoint64)(const AdjointArguments<double>&);
  void (*feedback_forward32)(const FeedbackForwardArguments<float>&);
  void (*feedback_forward64)(const FeedbackForwardArguments<double>&);
  void (*feedback_adjoint32)(const FeedbackAdjointArguments<float>&);
  void (*feedback_adjoint64)(const FeedbackAdjointArguments<double>&);
};

namespace baseline {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}

}  // namespace implicit_attention
