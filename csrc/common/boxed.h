// Operators as boxed functions: arguments are taken off the dispatcher's stack, and results put on it, by the names in
// the operator's schema.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>

#include "common/check.h"
#include "common/signature.h"

namespace vitkernels {

// One call of an operator. Arguments are taken before results are given, each once; the taker owns it.
class Call {
 public:
  Call(const char* op, const Signature& signature, StableIValue* stack)
      : checker(op), signature_(signature), stack_(stack) {}

  template <class T>
  T take(std::string_view name, std::string_view prefix = "") {
    ++num_taken_;
    return torch::stable::detail::to<T>(stack_[find(signature_.arguments, name, prefix)]);
  }

  // A tensor, or a list of them.
  template <class Result>
  void give(const Result& result, std::string_view name, std::string_view prefix = "") {
    if (num_taken_ != signature_.arguments.size()) throw std::logic_error("an argument was not taken");
    stack_[find(signature_.results, name, prefix)] = torch::stable::detail::from(result);
  }

  const Checker checker;

 private:
  // Usually the next one, since most callers follow the schema's order.
  size_t find(const std::vector<std::string>& names, std::string_view name, std::string_view prefix) {
    for (size_t i = 0; i < names.size(); ++i, ++next_) {
      if (next_ >= names.size()) next_ = 0;
      const std::string_view candidate = names[next_];
      const bool is_found =
          candidate.size() == prefix.size() + name.size() && candidate.starts_with(prefix) && candidate.ends_with(name);
      if (is_found) return next_++;
    }
    throw std::logic_error("not in the schema: " + std::string(prefix) + std::string(name));
  }

  const Signature& signature_;
  StableIValue* stack_;
  size_t next_ = 0, num_taken_ = 0;
};

// An operator's name as a template argument.
template <size_t kSize>
struct OperatorName {
  char text[kSize];
  constexpr OperatorName(const char (&name)[kSize]) { std::copy_n(name, kSize, text); }
};

// Registered for the operator: kFunction(call) takes all arguments and gives all results.
template <OperatorName kOp, void (*kFunction)(Call&)>
void boxed(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
  static const Signature signature(kOp.text);
  // The CPU library registers the schema; a CUDA library of another build may expect a different one.
  if (num_arguments != signature.arguments.size() || num_results != signature.results.size()) {
    fail("vitkernels::", kOp.text, ": got ", num_arguments, " arguments and ", num_results, " results, takes ",
         signature.arguments.size(), " and ", signature.results.size(),
         ": the CPU and CUDA libraries are of two builds");
  }
  try {
    Call call(kOp.text, signature, stack);
    kFunction(call);
  } catch (const AllocationError& error) {
    fail("vitkernels::", kOp.text, ": ", error.what());
  }
}

}  // namespace vitkernels
