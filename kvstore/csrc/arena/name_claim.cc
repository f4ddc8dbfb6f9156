#include "name_claim.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "shared_memory.h"

namespace kvstore {
namespace {

// Several processes may find the same remains; each round ends with one of them further.
constexpr int attempts_max = 64;

[[noreturn]] void fail(const std::string& path, const std::string& what, int error) {
    throw ArenaError(path + ": " + what + ": " + std::strerror(error));
}

bool leads_to(const std::string& path, const ProcessFile& file) noexcept {
    struct stat named {};
    struct stat opened {};
    return ::fstat(file.get(), &opened) == 0 && ::lstat(path.c_str(), &named) == 0 &&
           named.st_dev == opened.st_dev && named.st_ino == opened.st_ino;
}

}  // namespace

void remove_remains(const std::string& path) {
    for (int attempt = 0; attempt < attempts_max; ++attempt) {
        const ProcessFile found = ProcessFile::open(path, O_RDWR | O_NOFOLLOW | O_NONBLOCK);
        if (!found) {
            if (errno == ENOENT) {
                return;
            }
            fail(path, "exists and cannot be opened; remove it, or choose another name", errno);
        }
        ArenaHeader header{};
        const bool is_ours = ::pread(found.get(), &header, sizeof(header), 0) == sizeof(header) &&
                             std::memcmp(header.magic, arena_magic, sizeof(arena_magic)) == 0;
        if (!is_ours) {
            throw ArenaError(path + " exists and is not an arena of kvstore; remove it, or choose another name");
        }
        if (::flock(found.get(), LOCK_EX | LOCK_NB) != 0) {
            if (errno != EWOULDBLOCK) {
                fail(path, "cannot be locked", errno);
            }
            if (!leads_to(path, found)) {
                continue;
            }
            throw ArenaError(path + " is owned by process " + std::to_string(header.owner_pid) +
                             "; attach to it, close it there, or choose another name");
        }
        // Whoever meets the lock while these remains are being removed is told who holds it.
        header.owner_pid = static_cast<std::uint32_t>(::getpid());
        if (leads_to(path, found) &&
            (::pwrite(found.get(), &header, sizeof(header), 0) != sizeof(header) || ::unlink(path.c_str()) != 0)) {
            fail(path, "was left by a dead process and cannot be removed", errno);
        }
    }
    throw ArenaError(path + " is being opened by other processes over and over; try again, or choose another name");
}

ProcessFile open_unnamed(const std::string& directory) {
    ProcessFile file = ProcessFile::open(directory, O_TMPFILE | O_RDWR, 0600);
    if (!file) {
        fail(directory, "no file for shared memory can be made here; open the store without a name to use memfd", errno);
    }
    if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
        fail(directory, "a file for shared memory cannot be locked", errno);
    }
    return file;
}

void give_name(const ProcessFile& file, const std::string& path) {
    for (int attempt = 0; attempt < attempts_max; ++attempt) {
        if (::linkat(AT_FDCWD, file.proc_path().c_str(), AT_FDCWD, path.c_str(), AT_SYMLINK_FOLLOW) == 0) {
            return;
        }
        if (errno != EEXIST) {
            fail(path, "cannot be made", errno);
        }
        remove_remains(path);
    }
    throw ArenaError(path + " is being opened by other processes over and over; try again, or choose another name");
}

void remove_name(const ProcessFile& file, const std::string& path) noexcept {
    if (file && leads_to(path, file)) {
        ::unlink(path.c_str());
    }
}

}  // namespace kvstore
