#include "common/stable.h"
#include "schema.h"

STABLE_TORCH_LIBRARY(vitkernels, m) {
  for (const std::string& schema : vitkernels::schemas()) m.def(schema.c_str());
}
