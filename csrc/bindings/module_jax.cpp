// robustkern._jax: what JAX's compiled programs call on the processor (XLA's foreign function interface). The handler
// takes the interpreter's lock and gives one Python function the buffers where they lie.
#include <nanobind/nanobind.h>
#include <xla/ffi/api/c_api.h>

#include <cstdint>
#include <exception>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

PyObject* target = nullptr;  // called with the call's attribute, its arguments and its results; never released

XLA_FFI_Error* failed(const XLA_FFI_CallFrame& frame, const char* message) {
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message,
                                 XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return frame.api->XLA_FFI_Error_Create(&args);
}

// (address, number of the dtype, shape) of each buffer.
nb::list places_of(void* const* buffers, std::int64_t count) {
  nb::list places;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto& buffer = *static_cast<const XLA_FFI_Buffer*>(buffers[i]);
    nb::list shape;
    for (std::int64_t k = 0; k < buffer.rank; ++k) shape.append(buffer.dims[k]);
    places.append(nb::make_tuple(reinterpret_cast<std::uintptr_t>(buffer.data), static_cast<int>(buffer.dtype),
                                 nb::tuple(shape)));
  }
  return places;
}

// The one attribute, a text.
nb::str attribute_of(const XLA_FFI_Attrs& attributes) {
  if (attributes.size != 1 || attributes.types[0] != XLA_FFI_AttrType_STRING)
    throw std::invalid_argument("expected one attribute, a text");
  const auto& text = *static_cast<const XLA_FFI_ByteSpan*>(attributes.attrs[0]);
  return nb::str(text.ptr, text.len);
}

XLA_FFI_Error* call(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata& asked = *reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    asked.api_version.major_version = XLA_FFI_API_MAJOR;
    asked.api_version.minor_version = XLA_FFI_API_MINOR;
    return nullptr;
  }
  nb::gil_scoped_acquire lock;
  try {
    const nb::handle function = target;
    function(attribute_of(frame->attrs), places_of(frame->args.args, frame->args.size),
             places_of(frame->rets.rets, frame->rets.size));
    return nullptr;
  } catch (nb::python_error& error) {
    const nb::str kind(error.type().attr("__name__")), text(error.value());
    return failed(*frame, (std::string(kind.c_str()) + ": " + text.c_str()).c_str());
  } catch (const std::exception& error) {
    return failed(*frame, error.what());
  }
}

}  // namespace

NB_MODULE(_jax, m) {
  m.doc() = "What JAX calls on the processor; the version of the interface that it was built for.";
  m.attr("api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  // Returns what to register with XLA; from then on its calls are this function's.
  m.def(
      "handler",
      [](nb::callable function) {
        Py_XSETREF(target, function.release().ptr());
        return nb::capsule(reinterpret_cast<void*>(&call));
      },
      "function"_a);
}
