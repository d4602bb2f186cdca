// The operators' schemas (csrc/schema.cpp), and the names in them.
#pragma once

#include <string>
#include <vector>

namespace vitkernels {

const std::vector<std::string>& schemas();

// The names of an operator's arguments and results, in order; a single result has no name.
struct Signature {
  explicit Signature(const std::string& op);

  std::vector<std::string> arguments, results;
};

}  // namespace vitkernels
