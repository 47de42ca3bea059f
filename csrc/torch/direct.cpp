// `packed_linear` as a Python function that skips torch's dispatcher.
//
// The dispatcher's way from Python to a kernel (schema, boxed arguments and results) takes 1.2 us and touches several
// hundred cache lines, more than the product of a small layer. Here the tensor is looked at and the kernel called. Only
// this needs torch's own C++ ABI, so it is a library apart, made for one torch and one Python. Where it is missing, the
// function of the same meaning in ops/direct.py serves, which calls the operator; so it does for every call in which
// anybody but the kernel has a say: a mode, a subclass, a transform, tracing, autocast, a profiler, an input that does
// not fit.
#include "torch/direct.h"

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace {

const sp::DirectCalls* calls = nullptr;
PyObject* otherwise = nullptr;  // the function of ops/direct.py

constexpr double kShort = 1 << 18;  // bytes of weight times rows: some 10 us, for which the lock is not worth releasing

// Whether the dispatcher would go to the kernel of the CPU and nowhere else. (Autograd has no part in operators on
// handles, see ops/prepared.py.)
bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet passed({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                        c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});
  const auto thread = c10::impl::tls_local_dispatch_key_set();
  const auto keys = ((tensor.key_set() | thread.included_) - thread.excluded_) - passed;
  return keys.highestFunctionalityKey() == c10::DispatchKey::Undefined && tensor.is_cpu();
}

bool is_watched() {
  return at::impl::torch_function_mode_enabled() ||
         at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

// The tensor of an argument that may be None, which gives null; false for anything else.
bool unpack_optional(PyObject* arg, const at::Tensor** tensor) {
  if (arg == Py_None) return true;
  if (!THPVariable_CheckExact(arg)) return false;
  *tensor = &THPVariable_Unpack(arg);
  return true;
}

// Whether a derivative of any kind is wanted.
bool is_differentiated(const at::Tensor& tensor) {
  return (c10::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(0).defined();
}

// (x, handle, residual, values, bias, version, pointer). Null if the operator must serve.
PyObject* try_linear(PyObject* const* args, Py_ssize_t count) {
  if (count != 7 || !THPVariable_CheckExact(args[0]) || !PyLong_CheckExact(args[1])) return nullptr;
  if (!PyLong_CheckExact(args[6]) || (args[5] != Py_None && !PyLong_CheckExact(args[5]))) return nullptr;
  const at::Tensor *added = nullptr, *bias = nullptr;
  if (!unpack_optional(args[2], &added) || !unpack_optional(args[4], &bias)) return nullptr;
  if (!THPVariable_CheckExact(args[3])) return nullptr;
  const int64_t handle = PyLong_AsLongLong(args[1]);
  if (handle == -1) return nullptr;  // also what does not fit
  // A handle is the address of what the kernels read first; among many weights it is in no cache.
  for (int64_t at = 0; at < 384; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(handle) + at);
  const at::Tensor& x = THPVariable_Unpack(args[0]);
  if (!is_plain(x) || is_watched()) return nullptr;
  const at::Tensor& values = THPVariable_Unpack(args[3]);
  const bool is_changed = args[5] != Py_None && PyLong_AsUnsignedLongLong(args[5]) != values._version();
  const bool is_moved = PyLong_AsVoidPtr(args[6]) != values.const_data_ptr();
  if (is_changed || is_moved || is_differentiated(x) || is_differentiated(values)) Py_RETURN_NONE;
  if ((bias != nullptr && is_differentiated(*bias)) || (added != nullptr && is_differentiated(*added))) Py_RETURN_NONE;
  const sp::DirectWeight weight = calls->weight(handle);
  const int64_t dim = x.dim();
  if (dim == 0 || x.size(-1) != weight.in || static_cast<int>(x.scalar_type()) != weight.x_type || !x.is_contiguous()) {
    return nullptr;
  }
  c10::SmallVector<int64_t, 8> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.out;
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) m *= shape[i];
  // The bias that was prepared is this one (ops/linear.py), but its owner may have given it other memory.
  if ((bias != nullptr) != weight.has_bias) return nullptr;
  if (bias != nullptr && (!is_plain(*bias) || bias->dim() != 1 || bias->numel() != weight.out ||
                          !bias->is_contiguous() || bias->scalar_type() != x.scalar_type())) {
    return nullptr;
  }
  const void* bias_data = bias == nullptr ? nullptr : bias->const_data_ptr();
  const void* residual = nullptr;
  if (added != nullptr) {
    if (!is_plain(*added) || added->scalar_type() != x.scalar_type() || added->sizes() != c10::IntArrayRef(shape) ||
        !added->is_contiguous()) {
      return nullptr;
    }
    residual = added->const_data_ptr();
  }
  at::Tensor y = at::detail::empty_cpu(shape, x.scalar_type());
  if (static_cast<double>(weight.bytes) * static_cast<double>(m) < kShort) {
    calls->linear(handle, x.const_data_ptr(), m, bias_data, residual, y.mutable_data_ptr());
  } else {
    pybind11::gil_scoped_release no_gil;
    calls->linear(handle, x.const_data_ptr(), m, bias_data, residual, y.mutable_data_ptr());
  }
  return THPVariable_Wrap(std::move(y));
}

PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (PyObject* y = try_linear(args, count)) return y;
  if (PyErr_Occurred()) return nullptr;
  return PyObject_Vectorcall(otherwise, args, static_cast<size_t>(count), nullptr);
  END_HANDLE_TH_ERRORS
}

PyObject* bind(PyObject*, PyObject* args) {
  long long address = 0;
  PyObject* function = nullptr;
  if (!PyArg_ParseTuple(args, "LO", &address, &function)) return nullptr;
  const auto* found = reinterpret_cast<const sp::DirectCalls*>(address);
  if (found->version != sp::kDirectVersion) {
    PyErr_SetString(PyExc_ImportError, "the direct calls are of another build than the kernels; reinstall the package");
    return nullptr;
  }
  calls = found;
  Py_XSETREF(otherwise, Py_NewRef(function));
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"bind", bind, METH_VARARGS, "bind(address of the kernels' DirectCalls, function to call instead)"},
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear)), METH_FASTCALL,
     "linear(x, handle, residual, values, bias, version, pointer): see ops/direct.py"},
    {}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__direct() { return PyModule_Create(&module); }
