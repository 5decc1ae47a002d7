// SPDX-License-Identifier: Apache-2.0
// One launch: reads the request that build.py wrote into a file, runs it, and
// writes the buffers and the reached sites back into the same file.
#include "internal.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cpu {

namespace {

Kernel *kernels;
FILE *file;

int64_t number() {
  int64_t value;
  if (fread(&value, sizeof value, 1, file) != 1)
    fail("the request ends too early");
  return value;
}

const Kernel *find(const char *name) {
  for (Kernel *kernel = kernels; kernel; kernel = kernel->next)
    if (strcmp(kernel->name, name) == 0)
      return kernel;
  fail("this program has no kernel %s", name);
}

struct Buffer {
  long offset; // in the file
  size_t bytes;
  char *data;
};

std::vector<Buffer> read_buffers() {
  std::vector<Buffer> buffers(number());
  for (Buffer &buffer : buffers)
    buffer.bytes = number();
  for (Buffer &buffer : buffers) {
    buffer.offset = ftell(file);
    // 256: what a GPU's allocator promises. Exact, so that AddressSanitizer
    // knows the end.
    if (posix_memalign(reinterpret_cast<void **>(&buffer.data), 256,
                       buffer.bytes) != 0 ||
        fread(buffer.data, 1, buffer.bytes, file) != buffer.bytes)
      fail("a buffer of %zu bytes is missing", buffer.bytes);
  }
  return buffers;
}

} // namespace

Kernel::Kernel(const char *name, int parameters, Entry entry)
    : name(name), parameters(parameters), entry(entry), next(kernels) {
  kernels = this;
}

} // namespace cpu

int main(int, char **argv) {
  using namespace cpu;
  file = fopen(argv[2], "r+b");
  if (!file)
    fail("cannot open %s", argv[2]);

  Launch launch = {};
  launch.kernel = find(argv[1]);
  launch.blocks = static_cast<int>(number());
  launch.threads = static_cast<int>(number());
  launch.cluster = static_cast<int>(number());
  launch.shared_bytes = number();
  Schedule schedule;
  schedule.order = static_cast<Order>(number());
  schedule.seed = number();
  schedule.starved = static_cast<int>(number());
  schedule.patience = number();
  schedule.ns_per_poll = number();
  schedule.latest = number();
  for (int64_t count = number(); count > 0; --count)
    disabled[number() % MOST_SITES] = true;

  // An argument is eight bytes, or an offset into a buffer.
  std::vector<int64_t> of_buffer(number()), values(of_buffer.size());
  for (size_t i = 0; i < values.size(); ++i) {
    of_buffer[i] = number();
    values[i] = number();
  }
  if (launch.kernel->parameters != static_cast<int>(values.size()))
    fail("%s takes %d arguments, not %zu", argv[1], launch.kernel->parameters,
         values.size());
  std::vector<Buffer> buffers = read_buffers();
  std::vector<void *> arguments;
  for (size_t i = 0; i < values.size(); ++i) {
    if (of_buffer[i] >= 0)
      values[i] += reinterpret_cast<int64_t>(buffers[of_buffer[i]].data);
    arguments.push_back(&values[i]);
  }
  launch.arguments = arguments.data();

  run(launch, schedule);
  for (Buffer &buffer : buffers) {
    fseek(file, buffer.offset, SEEK_SET);
    fwrite(buffer.data, 1, buffer.bytes, file);
  }
  fwrite(reached, 1, MOST_SITES, file);
  fclose(file);
  _Exit(0);
}
