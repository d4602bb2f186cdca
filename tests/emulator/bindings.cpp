// The emulator's interface for tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "allocator.h"
#include "memory.h"
#include "report.h"

namespace py = pybind11;
using namespace emulator;

namespace {

class FreshAllocations {  // a context manager
 public:
  void enter() { before_ = std::exchange(Memory::instance().allocations_are_fresh, true); }
  void exit(const py::args&) { Memory::instance().allocations_are_fresh = before_; }

 private:
  bool before_ = false;
};

void configure(uint64_t seed, bool check_races, bool check_uninitialised, int compute_capability, int64_t shared_limit,
               int multiprocessors, uint64_t instruction_limit) {
  state().options = {seed,         check_races,     check_uninitialised, compute_capability,
                     shared_limit, multiprocessors, instruction_limit};
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "Executes the PTX of CUDA kernels on the CPU, and reports what a GPU would let pass.";
  install_allocator();

  py::class_<Error>(m, "Error")
      .def_readonly("kind", &Error::kind)
      .def_readonly("kernel", &Error::kernel)
      .def_readonly("file", &Error::file)
      .def_readonly("line", &Error::line)
      .def_readonly("instruction", &Error::instruction)
      .def_readonly("message", &Error::message)
      .def("__repr__", [](const Error& e) {
        std::string location = e.line ? e.file + ":" + std::to_string(e.line) + ": " : "";
        return location + e.kind + " in " + e.kernel + ": " + e.message +
               (e.instruction.empty() ? "" : " [" + e.instruction + "]");
      });
  py::class_<LaunchRecord>(m, "Launch")
      .def_readonly("kernel", &LaunchRecord::kernel)
      .def_readonly("symbol", &LaunchRecord::symbol)
      .def_readonly("grid", &LaunchRecord::grid)
      .def_readonly("block", &LaunchRecord::block)
      .def_readonly("shared_bytes", &LaunchRecord::shared_bytes)
      .def_readonly("failed", &LaunchRecord::failed);
  py::class_<Traffic>(m, "Traffic").def_readonly("total", &Traffic::total).def_readonly("distinct", &Traffic::distinct);
  py::class_<Conflicts>(m, "Conflicts")
      .def_readonly("file", &Conflicts::file)
      .def_readonly("line", &Conflicts::line)
      .def_readonly("instruction", &Conflicts::instruction)
      .def_readonly("accesses", &Conflicts::accesses)
      .def_readonly("wavefronts", &Conflicts::wavefronts)
      .def_readonly("conflicts", &Conflicts::conflicts);
  py::class_<Counters>(m, "Counters")
      .def_readonly("launches", &Counters::launches)
      .def_readonly("instructions", &Counters::instructions)
      .def_readonly("read", &Counters::read)
      .def_readonly("written", &Counters::written)
      .def_readonly("conflicts", &Counters::conflicts);
  py::class_<FreshAllocations>(m, "FreshAllocations")
      .def("__enter__", &FreshAllocations::enter)
      .def("__exit__", &FreshAllocations::exit);

  const Options defaults;
  m.def("configure", &configure, py::kw_only(), py::arg("seed") = defaults.seed,
        py::arg("check_races") = defaults.check_races, py::arg("check_uninitialised") = defaults.check_uninitialised,
        py::arg("compute_capability") = defaults.compute_capability, py::arg("shared_limit") = defaults.shared_limit,
        py::arg("multiprocessors") = defaults.multiprocessors,
        py::arg("instruction_limit") = defaults.instruction_limit,
        "Sets all options; those not given return to their defaults. A compute capability counts for images not used "
        "before.");
  m.def(
      "reset", [] { state().errors.clear(), state().launches.clear(), state().counters.clear(); },
      "Forgets errors, launches and counters.");
  m.def("errors", [] { return state().errors; }, "The errors since the last reset, one for each launch that failed.");
  m.def("launches", [] { return state().launches; }, "The launches since the last reset, in order.");
  m.def("counters", [] { return state().counters; }, "By kernel name, over all launches since the last reset.");
  m.def(
      "fresh_allocations", [] { return FreshAllocations(); },
      "A context in which memory that torch allocates counts as unwritten until the host or a kernel writes it.");
  m.def(
      "register_range",
      [](uintptr_t address, size_t bytes, bool initialised) {
        Memory::instance().add(reinterpret_cast<void*>(address), bytes, !initialised);
      },
      py::arg("address"), py::arg("bytes"), py::arg("initialised") = true,
      "Makes memory that torch did not allocate known. Not initialised, it is filled with a pattern.");
  m.def(
      "unregister_range", [](uintptr_t address) { Memory::instance().remove(reinterpret_cast<void*>(address)); },
      py::arg("address"));
}
