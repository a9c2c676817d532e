#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>

namespace {

constexpr auto KEY = c10::DispatchKey::PrivateUse1;
constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 2;

// ------------------------------------------------------------------ what is counted and refused

std::mutex mutex;
std::map<std::string, int64_t> op_counts;
std::set<std::string> missing_ops;
std::atomic<bool> no_double{false};
std::atomic<int64_t> to_device{0}, to_host{0}, to_device_bytes{0}, to_host_bytes{0}, waits{0};
std::atomic<int64_t> used[DEVICES], peaks[DEVICES], limits[DEVICES];
thread_local int current = 0;

void check_type(c10::ScalarType type) {
  if (no_double && (type == c10::kDouble || type == c10::kComplexDouble))
    TORCH_CHECK_TYPE(false, "Cannot convert a MPS Tensor to float64 dtype as the MPS framework ",
                     "doesn't support float64. Please use float32 instead.");
}

void reserve(int device, int64_t bytes) {
  int64_t have = used[device] += bytes;
  if (limits[device] && have > limits[device]) {
    used[device] -= bytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "pretend out of memory. Tried to allocate ",
                     bytes / 1048576.0, " MiB. GPU ", device, " has a total capacity of ",
                     limits[device] / 1048576.0, " MiB of which ",
                     (limits[device] - used[device]) / 1048576.0, " MiB is free.");
  }
  int64_t top = peaks[device];
  while (have > top && !peaks[device].compare_exchange_weak(top, have)) {}
}

struct Block {  // of the pretended memory: it lies in a CPU DataPtr
  c10::DataPtr memory;
  int64_t bytes;
  int device;
  ~Block() { used[device] -= bytes; }
};

void drop(void* block) { delete static_cast<Block*>(block); }

c10::DataPtr counted_pointer(c10::DataPtr memory, int64_t bytes, int device) {
  reserve(device, bytes);
  void* data = memory.get();
  auto* block = new Block{std::move(memory), bytes, device};
  return {data, block, &drop, c10::Device(TYPE, static_cast<c10::DeviceIndex>(device))};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return counted_pointer(c10::GetCPUAllocator()->allocate(bytes), static_cast<int64_t>(bytes), current);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(TYPE, &allocator);

// ------------------------------------------------------------------ device, generator, hooks

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = TYPE;
  c10::DeviceType type() const override { return TYPE; }
  c10::Device getDevice() const override {
    return c10::Device(TYPE, static_cast<c10::DeviceIndex>(current));
  }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override { *event = reinterpret_cast<void*>(1); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : c10::GeneratorImpl {  // draws by a CPU generator of another seed
  at::Generator inner;
  uint64_t shown_seed = 0;
  explicit Generator(c10::DeviceIndex device)
      : GeneratorImpl(c10::Device(TYPE, device), c10::DispatchKeySet(KEY)),
        inner(at::detail::createCPUGenerator(0)) { set_current_seed(c10::default_rng_seed_val); }
  void set_current_seed(uint64_t seed) override {
    shown_seed = seed;
    inner.set_current_seed((seed ^ 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull);
  }
  uint64_t current_seed() const override { return shown_seed; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return shown_seed;
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->inner = inner.clone();
    copy->shown_seed = shown_seed;
    return copy;
  }
};

const at::Generator& default_generator(c10::DeviceIndex device) {
  static at::Generator made[DEVICES] = {at::make_generator<Generator>(0),
                                        at::make_generator<Generator>(1)};
  return made[device < 0 ? current : device];
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(current);
  }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    auto before = getCurrentDevice();
    current = device;
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? getCurrentDevice() : device);
  }
  at::Device getDeviceFromPtr(void*) const override {
    return c10::Device(TYPE, getCurrentDevice());
  }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    c10::DeviceGuard guard(impl->device());
    auto memory = allocator.allocate(bytes);
    std::memcpy(memory.get(), impl->data(), std::min<size_t>(bytes, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(memory));
    impl->set_nbytes(bytes);
  }
};

// ------------------------------------------------------------------ tensors here and there

bool on_device(const at::Tensor& t) { return t.defined() && t.device().type() == TYPE; }

at::Tensor tensor_on(c10::Storage storage, c10::DispatchKeySet keys, const at::Tensor& shaped,
                     bool view = false) {
  auto made = view ? at::detail::make_tensor<c10::TensorImpl>(
                         c10::TensorImpl::VIEW, std::move(storage), keys, shaped.dtype())
                   : at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys,
                                                              shaped.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(shaped.sizes(), shaped.strides(),
                                                    shaped.storage_offset());
  if (shaped.is_conj()) made._set_conj(true);
  if (shaped.is_neg()) made._set_neg(true);
  return made;
}

struct HostViews {  // device storages that an operator was given, and the CPU's view of their memory
  struct Pair { c10::Storage impl, cpu; c10::DispatchKeySet keys; };
  std::vector<Pair> storages;

  c10::Storage host(const c10::Storage& impl, c10::DispatchKeySet keys) {
    for (auto& pair : storages)
      if (pair.impl.unsafeGetStorageImpl() == impl.unsafeGetStorageImpl()) return pair.cpu;
    c10::DataPtr pointer(const_cast<void*>(impl.data()), c10::Device(c10::kCPU));
    c10::Storage cpu(c10::Storage::use_byte_size_t(), impl.nbytes(), std::move(pointer),
                     c10::GetCPUAllocator(), true);
    storages.push_back({impl, cpu, keys});
    return cpu;
  }
  at::Tensor host(const at::Tensor& t) {
    auto cpu = host(t.storage(), t.key_set());
    return tensor_on(std::move(cpu), c10::DispatchKeySet(c10::DispatchKey::CPU), t);
  }
  at::Tensor device(const at::Tensor& t, int index) {
    check_type(t.scalar_type());
    for (auto& pair : storages)  // a view: an inference tensor only where its base is one
      if (pair.cpu.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl())
        return tensor_on(pair.impl, pair.keys, t, true);
    auto* held = new at::Tensor(t);
    c10::DataPtr memory(const_cast<void*>(t.storage().data()), held,
                        [](void* h) { delete static_cast<at::Tensor*>(h); },
                        c10::Device(c10::kCPU));
    auto bytes = static_cast<int64_t>(t.storage().nbytes());
    c10::Storage impl(c10::Storage::use_byte_size_t(), bytes,
                     counted_pointer(std::move(memory), bytes, index), &allocator, true);
    return tensor_on(std::move(impl), c10::DispatchKeySet(KEY), t);
  }
};

void count(const std::string& name) {
  std::lock_guard<std::mutex> held(mutex);
  ++op_counts[name];
}

const std::set<std::string> INDEXED = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index", "aten::_unsafe_index_put"};

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name() +
      (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  count(name);
  {
    std::lock_guard<std::mutex> held(mutex);
    if (missing_ops.count(schema.name()) || missing_ops.count(name))
      TORCH_CHECK_NOT_IMPLEMENTED(false, "The operator '", name,
                                  "' is not currently implemented for the MPS device.");
  }
  const auto& asked = schema.arguments();
  const size_t n = asked.size(), begin = stack->size() - n;
  HostViews views;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // as given, and the CPU's view
  std::vector<at::Tensor> foreign;                     // of dimensions, on the CPU
  int index = -1;
  auto to_host_view = [&](const at::Tensor& t, bool listed, bool forgiven) -> at::Tensor {
    if (!t.defined()) return t;
    if (!on_device(t)) {
      if (!forgiven && (t.dim() > 0 || listed)) foreign.push_back(t);
      return t;
    }
    TORCH_CHECK(index < 0 || index == t.device().index() || t.dim() == 0,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                "pretend:", index, " and ", t.device(), "! (in ", name, ")");
    if (index < 0 || t.dim() > 0) index = t.device().index();
    at::Tensor cpu = views.host(t);
    pairs.emplace_back(t, cpu);
    return cpu;
  };
  for (size_t i = 0; i < n; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      value = to_host_view(value.toTensor(), false, false);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(to_host_view(t, true, false));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      const bool forgiven = INDEXED.count(schema.name());
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t.has_value() ? std::optional<at::Tensor>(to_host_view(*t, true, forgiven)) : t);
      value = list;
    } else if (value.isDevice()) {
      auto device = value.toDevice();
      if (device.type() == TYPE) index = device.has_index() ? device.index() : current;
      value = c10::Device(c10::kCPU);
    }
  }
  const bool here = !pairs.empty() || index >= 0;
  for (size_t i = 0; i < n; ++i) {  // random numbers are the device generator's
    auto& value = (*stack)[begin + i];
    if (asked[i].name() != "generator" && !value.isGenerator()) continue;
    at::Generator generator = value.isGenerator() ? value.toGenerator() : default_generator(index);
    TORCH_CHECK(here, "Expected a 'cpu' device type for generator but found 'pretend' (in ", name,
                ")");
    TORCH_CHECK(generator.device().type() == TYPE,
                "Expected a 'pretend' device type for generator but found '", generator.device().type(),
                "' (in ", name, ")");
    value = static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
  }
  TORCH_CHECK(foreign.empty(),
              "Expected all tensors to be on the same device, but found at least two devices, ",
              "pretend:", index < 0 ? current : index, " and ",
              foreign.empty() ? c10::Device(c10::kCPU) : foreign[0].device(), "! (in ", name,
              ")");
  if (index < 0) index = current;
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (auto& [given, cpu] : pairs) {  // what an operator gave another size or memory
    if (cpu.sizes() == given.sizes() && cpu.strides() == given.strides() &&
        cpu.storage().data() == given.storage().data()) continue;
    auto moved = HostViews().device(cpu.is_contiguous() ? cpu : cpu.clone(), index);
    auto* impl = given.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(moved.storage());
    impl->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
  }
  auto back = [&](const at::Tensor& t) -> at::Tensor {
    if (!t.defined() || t.device().type() != c10::kCPU) return t;
    for (auto& [given, cpu] : pairs)
      if (cpu.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return given;
    return views.device(t, index);
  };
  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (size_t i = 0; i < results; ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(back(t));
      value = list;
    }
  }
}

// ------------------------------------------------------------------ what no fallback can do

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
                 std::optional<c10::Layout>, std::optional<c10::Device> device,
                 std::optional<bool> pinned, std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Cannot pin 'pretend' memory, only CPU memory can be pinned");
  auto type = c10::dtype_or_default(dtype);
  check_type(type);
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(KEY), type, format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                         std::optional<c10::Device> device, std::optional<bool>) {
  auto type = c10::dtype_or_default(dtype);
  check_type(type);
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(KEY),
                                           type);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  HostViews views;
  if (!on_device(from)) {
    ++to_device;
    to_device_bytes += to.numel() * to.element_size();
  } else if (!on_device(to)) {
    ++to_host;
    to_host_bytes += to.numel() * to.element_size();
  }
  count("aten::copy_");
  at::Tensor target = on_device(to) ? views.host(to) : to;
  at::AutoDispatchBelowADInplaceOrView below;
  target.copy_(on_device(from) ? views.host(from) : from);
  return to;
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size,
                         std::optional<c10::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  auto due = (self.storage_offset() + self.numel()) * self.element_size();
  if (static_cast<int64_t>(self.storage().nbytes()) < due)
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), due);
  return self;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  ++waits;
  count("aten::_local_scalar_dense");
  HostViews views;
  return at::_local_scalar_dense(views.host(self));
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, c10::SymInt offset,
                        c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device().type() == TYPE, "Expected storage on pretend, found one on ",
              source.device());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                             offset.expect_int());
  return self;
}

at::Tensor& set_storage_whole(at::Tensor& self, c10::Storage source) {
  int64_t count = static_cast<int64_t>(source.nbytes() / self.element_size()), one = 1;
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(c10::IntArrayRef(&count, 1), c10::IntArrayRef(&one, 1), 0);
  return self;
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

void check_same_device(const at::Tensor& one, const at::Tensor& other, const char* what) {
  TORCH_CHECK(one.device() == other.device(),
              "Expected all tensors to be on the same device, but found at least two devices, ",
              one.device(), " and ", other.device(), "! (in ", what, ")");
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef more,
                    c10::SymInt groups) {
  count("aten::convolution");
  check_same_device(x, w, "convolution");
  TORCH_CHECK(x.scalar_type() == w.scalar_type(), "Input type (", x.scalar_type(),
              ") and weight type (", w.scalar_type(), ") should be the same");
  HostViews views;
  std::optional<at::Tensor> bias;
  if (b.has_value() && b->defined()) {
    check_same_device(x, *b, "convolution");
    bias = views.host(*b);
  }
  auto y = at::convolution_symint(views.host(x), views.host(w), bias, stride, padding, dilation,
                                  transposed, more, groups);
  return views.device(y, x.device().index());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& g, const at::Tensor& x, const at::Tensor& w, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
    c10::SymIntArrayRef more, c10::SymInt groups, std::array<bool, 3> mask) {
  count("aten::convolution_backward");
  HostViews views;
  c10::SymInt out = transposed ? w.sym_size(1) * groups : w.sym_size(0);
  auto [a, b, c] = at::convolution_backward_symint(
      views.host(g), views.host(x), views.host(w), c10::SymIntArrayRef(&out, 1), stride, padding,
      dilation, transposed, more, groups, mask);
  auto back = [&](const at::Tensor& t) {
    return t.defined() ? views.device(t, x.device().index()) : t;
  };
  return {back(a), back(b), back(c)};
}

int64_t choose_math_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>&, double, bool, std::optional<double>,
                         bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}

// All that Python calls is an operator: pybind11 alone would take a quarter of the build.
TORCH_LIBRARY(pretend_device, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("get_state(int device) -> Tensor", [](int64_t device) {
    return default_generator(device).get_state();
  });
  m.def("set_state(int device, Tensor state) -> ()", [](int64_t device, const at::Tensor& state) {
    at::Generator(default_generator(device)).set_state(state);
  });
  m.def("seed(int device, int seed) -> ()", [](int64_t device, int64_t seed) {
    at::Generator(default_generator(device)).set_current_seed(seed);
  });
  m.def("census(bool forget) -> Dict(str, int)", [](bool forget) {
    std::lock_guard<std::mutex> held(mutex);
    c10::Dict<std::string, int64_t> found;
    for (const auto& [name, times] : op_counts) found.insert(name, times);
    if (forget) op_counts.clear();
    return found;
  });
  m.def("lacks(str[] names) -> ()", [](std::vector<std::string> names) {
    std::lock_guard<std::mutex> held(mutex);
    missing_ops = {names.begin(), names.end()};
  });
  m.def("no_double(bool on) -> ()", [](bool on) { no_double = on; });
  m.def("traffic(bool forget) -> Dict(str, int)", [](bool forget) {
    c10::Dict<std::string, int64_t> found;
    found.insert("to device", to_device);
    found.insert("to device bytes", to_device_bytes);
    found.insert("to host", to_host);
    found.insert("to host bytes", to_host_bytes);
    found.insert("waits", waits);
    if (forget) to_device = to_host = to_device_bytes = to_host_bytes = waits = 0;
    return found;
  });
  m.def("memory(int device) -> (int, int, int)", [](int64_t device) {
    return std::make_tuple(used[device].load(), peaks[device].load(), limits[device].load());
  });
  m.def("limit(int device, int bytes) -> ()", [](int64_t device, int64_t bytes) {
    limits[device] = bytes;
  });
  m.def("forget_peak(int device) -> ()", [](int64_t device) {
    peaks[device] = used[device].load();
  });
  m.def("current() -> int", []() -> int64_t { return current; });
  m.def("choose(int device) -> ()", [](int64_t device) { current = static_cast<int>(device); });
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage", set_storage_whole);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  // Where PyTorch has a kernel of other operators for any device, the CPU's own is taken, as a GPU
  // has its own.
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames()) {
    auto found = c10::Dispatcher::singleton().findOp(op);
    if (op.getNamespace() != std::string_view("aten") || !found) continue;
    auto has = [&](c10::DispatchKey key) { return found->hasKernelForDispatchKey(key); };
    if (has(c10::DispatchKey::CPU) && !has(KEY) &&
        (has(c10::DispatchKey::CompositeExplicitAutograd) ||
         has(c10::DispatchKey::CompositeExplicitAutogradNonFunctional))) {
      auto name = op.name + (op.overload_name.empty() ? "" : "." + op.overload_name);
      m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

// A copy reads conjugates and negatives itself: to make them real first would copy, and so for ever.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using at::autocast::CastPolicy;
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_math_attention)
}
