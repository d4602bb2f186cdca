#include "common/signature.h"
#include "common/stable.h"

STABLE_TORCH_LIBRARY(vitkernels, m) {
  for (const std::string& schema : vitkernels::schemas()) m.def(schema.c_str());
}
