#include "shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

#include "name_claim.h"
#include "slab_size.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace kvstore {
namespace {

// Clearing pages is what takes the time at open; it scales with cores up to the memory's bandwidth.
constexpr unsigned populate_threads_max = 8;
constexpr std::uint64_t populate_chunk_bytes = std::uint64_t{64} << 20;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) { return (value + unit - 1) / unit * unit; }

// A number of /proc/meminfo as it stands there, 0 when there is none.
std::uint64_t meminfo(const std::string& wanted) {
    std::ifstream file("/proc/meminfo");
    std::string name;
    std::uint64_t value = 0;
    for (std::string line; std::getline(file, line);) {
        if (std::istringstream(line) >> name >> value && name == wanted + ":") {
            return value;
        }
    }
    return 0;
}

// The choice of a setting like "always [madvise] never".
std::string chosen(const char* path) {
    std::ifstream file(path);
    std::string text;
    std::getline(file, text);
    const std::size_t begin = text.find('[');
    const std::size_t end = text.find(']');
    return begin == std::string::npos || end == std::string::npos ? "" : text.substr(begin + 1, end - begin - 1);
}

// Whether the kernel maps any of the memory at `data` by huge pages: what it says of the mapping, not what was asked.
bool has_huge_mappings(const std::byte* data) {
    std::ifstream file("/proc/self/smaps");
    std::ostringstream start;
    start << std::hex << reinterpret_cast<std::uintptr_t>(data) << '-';
    bool is_ours = false;
    for (std::string line; std::getline(file, line);) {
        if (line.find(':') == std::string::npos || line.find('-') < line.find(' ')) {
            is_ours = line.starts_with(start.str());
        } else if (is_ours && (line.starts_with("ShmemPmdMapped:") || line.starts_with("FilePmdMapped:"))) {
            std::uint64_t kib = 0;
            if (std::istringstream(line.substr(line.find(':') + 1)) >> kib && kib != 0) {
                return true;
            }
        }
    }
    return false;
}

// Makes every page exist, with errno's value when that fails. A failing madvise returns; a failing touch would not.
int populate(std::byte* data, std::uint64_t size_bytes) {
    const std::uint64_t chunks = round_up(size_bytes, populate_chunk_bytes) / populate_chunk_bytes;
    std::atomic<std::uint64_t> next{0};
    std::atomic<int> error{0};
    const auto work = [&] {
        for (std::uint64_t chunk = next++; chunk < chunks && error == 0; chunk = next++) {
            const std::uint64_t begin = chunk * populate_chunk_bytes;
            const std::uint64_t size = std::min(populate_chunk_bytes, size_bytes - begin);
            while (::madvise(data + begin, size, MADV_POPULATE_WRITE) != 0) {
                if (errno != EINTR && errno != EAGAIN) {
                    error = errno;
                    return;
                }
            }
        }
    };
    const std::uint64_t cores = std::max(1U, std::thread::hardware_concurrency());
    const std::uint64_t helpers = std::min({cores, std::uint64_t{populate_threads_max}, chunks}) - 1;
    std::vector<std::jthread> threads;
    for (std::uint64_t count = 0; count < helpers; ++count) {
        threads.emplace_back(work);
    }
    work();
    threads.clear();
    return error;
}

}  // namespace

std::string SharedMemory::map(std::uint64_t size_bytes, bool ask_for_huge_pages) {
    if (::ftruncate(memory_.get(), static_cast<off_t>(size_bytes)) != 0) {
        return std::strerror(errno);
    }
    void* mapped = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_.get(), 0);
    if (mapped == MAP_FAILED) {
        return std::strerror(errno);
    }
    data_ = static_cast<std::byte*>(mapped);
    size_bytes_ = size_bytes;
    if (ask_for_huge_pages) {
        ::madvise(data_, size_bytes, MADV_HUGEPAGE);  // a wish: `huge_pages` says what came of it
    }
    int error = populate(data_, size_bytes);
    if (error == EINVAL) {  // before Linux 5.14: the pages exist, and are mapped one by one later
        error = ::fallocate(memory_.get(), 0, 0, static_cast<off_t>(size_bytes)) == 0 ? 0 : errno;
    }
    if (error == 0) {
        return "";
    }
    ::munmap(data_, size_bytes);
    data_ = nullptr;
    size_bytes_ = 0;
    // EFAULT stands for the signal that a touch would have raised: the file system is full.
    return std::strerror(error == EFAULT ? ENOSPC : error);
}

void SharedMemory::write_header(std::uint64_t capacity_bytes) {
    ArenaHeader header{{}, arena_version, static_cast<std::uint32_t>(::getpid()), capacity_bytes};
    std::memcpy(header.magic, arena_magic, sizeof(arena_magic));
    std::memcpy(data_, &header, sizeof(header));
}

// Reserved huge pages. False, with the reason kept, where they are too few.
bool SharedMemory::map_huge_pages(std::uint64_t size_bytes) {
    const std::uint64_t page = meminfo("Hugepagesize") * 1024;
    if (page == 0) {
        huge_pages_.why_not = "this kernel has no huge pages";
        return false;
    }
    if (size_bytes < page) {
        huge_pages_.why_not = "the arena is smaller than one huge page";
        return false;
    }
    const std::uint64_t needed = round_up(size_bytes, page) / page;
    const std::uint64_t reserved = meminfo("HugePages_Rsvd");
    const std::uint64_t unused = meminfo("HugePages_Free");
    const std::uint64_t available = unused - std::min(unused, reserved);
    if (available < needed) {
        huge_pages_.why_not = std::to_string(needed) + " huge pages of " + std::to_string(page >> 20) +
                              " MiB are needed and " + std::to_string(available) +
                              " are free (raise vm.nr_hugepages)";
        return false;
    }
    memory_ = ProcessFile::memfd("kvstore-arena", MFD_HUGETLB | MFD_ALLOW_SEALING);
    const std::string problem = memory_ ? map(needed * page, false) : std::strerror(errno);
    if (!problem.empty()) {
        memory_.close();
        huge_pages_.why_not = "reserved huge pages cannot be had: " + problem;
        return false;
    }
    huge_pages_ = {true, ""};
    return true;
}

std::shared_ptr<SharedMemory> SharedMemory::anonymous(std::uint64_t capacity_bytes) {
    const std::uint64_t size_bytes = arena_header_bytes + round_up(capacity_bytes, page_bytes);
    const auto memory = std::make_shared<SharedMemory>(Private{});
    if (!memory->map_huge_pages(size_bytes)) {
        const std::string mode = chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
        const bool ask = mode == "advise" || mode == "within_size" || mode == "always" || mode == "force";
        memory->memory_ = ProcessFile::memfd("kvstore-arena", MFD_ALLOW_SEALING);
        const std::string problem = memory->memory_ ? memory->map(size_bytes, ask) : std::strerror(errno);
        if (!problem.empty()) {
            throw ArenaError("shared memory of " + std::to_string(size_bytes) + " bytes cannot be had (memfd): " +
                             problem + "; open the store with less memory");
        }
        memory->huge_pages_.in_use = ask && has_huge_mappings(memory->data_);
        if (memory->huge_pages_.in_use) {
            memory->huge_pages_.why_not.clear();
        } else {
            memory->huge_pages_.why_not +=
                ask ? "; the kernel found no transparent ones"
                    : "; transparent ones for shared memory are set to '" + (mode.empty() ? "nothing" : mode) +
                          "' (shmem_enabled: 'advise')";
        }
    }
    // A process that attaches could otherwise shrink the file, and touching it would be a SIGBUS here.
    if (::fcntl(memory->memory_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        throw ArenaError(std::string("shared memory cannot be sealed (memfd): ") + std::strerror(errno));
    }
    memory->write_header(capacity_bytes);
    return memory;
}

std::shared_ptr<SharedMemory> SharedMemory::named(const std::string& directory, const std::string& name,
                                                  std::uint64_t capacity_bytes) {
    const std::string path = directory + "/kvstore-" + name;
    const std::uint64_t size_bytes = arena_header_bytes + round_up(capacity_bytes, page_bytes);
    remove_remains(path);  // first, because they may take the room that is needed
    const auto refuse = [&](const std::string& problem) {
        struct statvfs room {};
        const std::uint64_t free_bytes = ::statvfs(directory.c_str(), &room) == 0 ? room.f_bavail * room.f_frsize : 0;
        throw ArenaError(path + ": " + std::to_string(size_bytes) + " bytes are needed and " +
                         std::to_string(free_bytes) + " are free in " + directory + " (" + problem +
                         "); mount it larger, or open the store without a name to use memfd");
    };
    struct statvfs room {};
    if (::statvfs(directory.c_str(), &room) != 0) {
        refuse(std::strerror(errno));
    }
    // A file system without a limit of its own says 0 blocks in all.
    if (room.f_blocks != 0 && std::uint64_t{room.f_bavail} * room.f_frsize < size_bytes) {
        refuse(std::strerror(ENOSPC));
    }
    const auto memory = std::make_shared<SharedMemory>(Private{});
    memory->lock_ = open_unnamed(directory);
    // Passed to others, who must not share the lock.
    memory->memory_ = memory->lock_.reopen(O_RDWR);
    const std::string problem = memory->memory_ ? memory->map(size_bytes, true) : std::strerror(errno);
    if (!problem.empty()) {
        refuse(problem);
    }
    memory->write_header(capacity_bytes);
    memory->huge_pages_.in_use = has_huge_mappings(memory->data_);
    if (!memory->huge_pages_.in_use) {
        memory->huge_pages_.why_not = directory + " gives none (mount it with huge=advise, or use memfd)";
    }
    give_name(memory->lock_, path);
    memory->path_ = path;
    return memory;
}

void SharedMemory::release() noexcept {
    if (!is_inherited() && !path_.empty()) {
        remove_name(lock_, path_);
    }
    path_.clear();
    memory_.close();
    lock_.close();
}

SharedMemory::~SharedMemory() {
    release();
    if (data_ != nullptr) {
        ::munmap(data_, size_bytes_);
    }
}

}  // namespace kvstore
