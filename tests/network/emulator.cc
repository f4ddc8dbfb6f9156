// A link between two network namespaces: delay, seeded loss, rate and queue, each way by itself, changed while it runs.
//
// The program makes both namespaces, gives each a TUN device and carries packets between them. The namespaces have no
// names: they exist as long as this program or a process inside runs, so that nothing can be left behind. It ends when
// its standard input does, and that ends when whoever started it does.
//
//   emulator MTU
//
// First line out: `ready DESCRIPTOR_A DESCRIPTOR_B`, the namespaces, to be entered by way of /proc/PID/fd; addresses
// are 10.78.0.1 and 10.78.0.2. A problem is one line `cannot WHAT: WHY` and exit status 2. Then each line in is
// answered by one line out:
//
//   set WAY DELAY_US LOSS_PPM RATE_BITS_PER_S QUEUE_BYTES SEED    WAY is ab or ba; rate 0 is unlimited
//   down WAY            lose every packet that way, those under way, too
//   down_after WAY N    lose every packet after the next N; those still arrive
//   up WAY
//   count WAY           FORWARDED LOST OVERFLOWED CUT FORWARDED_BYTES IS_UP

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Nanoseconds = std::chrono::nanoseconds;

constexpr auto kLongestSleep = std::chrono::milliseconds(20);
constexpr int kPacketsAtOnce = 64;
constexpr int kDeviceQueuePackets = 10000;
constexpr const char* kDevice = "link0";
constexpr const char* kNoIpv6 = "/proc/sys/net/ipv6/conf/all/disable_ipv6";
constexpr const char* kReceiveBuffer = "4096 131072 67108864";
constexpr const char* kSendBuffer = "4096 65536 67108864";

[[noreturn]] void fail(const std::string& what, int error = errno) {
    std::cout << "cannot " << what << ": " << std::strerror(error) << std::endl;
    std::exit(2);
}

int checked(int result, const char* what) {
    if (result < 0) {
        fail(what);
    }
    return result;
}

int open_own_namespace() { return checked(open("/proc/thread-self/ns/net", O_RDONLY), "open the network namespace"); }

/// Only the namespace of the thread that writes is changed.
void write_setting(const char* path, const char* value) {
    std::ofstream file(path);
    file << value << std::flush;
    if (!file) {
        fail(std::string("set ") + path);
    }
}

void bring_up(int control, const char* device) {
    ifreq request{};
    std::strncpy(request.ifr_name, device, IFNAMSIZ - 1);
    checked(ioctl(control, SIOCGIFFLAGS, &request), "read the flags of a device");
    request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_UP);
    checked(ioctl(control, SIOCSIFFLAGS, &request), "bring a device up");
}

void set_address(int control, unsigned long what, const char* address) {
    ifreq request{};
    std::strncpy(request.ifr_name, kDevice, IFNAMSIZ - 1);
    auto* place = reinterpret_cast<sockaddr_in*>(&request.ifr_addr);
    place->sin_family = AF_INET;
    inet_pton(AF_INET, address, &place->sin_addr);
    checked(ioctl(control, what, &request), "set the address of a device");
}

void set_number(int control, unsigned long what, int number) {
    ifreq request{};
    std::strncpy(request.ifr_name, kDevice, IFNAMSIZ - 1);
    request.ifr_mtu = number;  // ifr_qlen is the same place of a union
    checked(ioctl(control, what, &request), "set the MTU or queue of a device");
}

struct Host {
    int name_space;
    int device;
};

/// A namespace of its own with an interface whose packets `device` reads and writes.
Host make_host(const char* address, int mtu) {
    checked(unshare(CLONE_NEWNET), "make a network namespace (it needs CAP_SYS_ADMIN)");
    const int name_space = open_own_namespace();
    const int device = checked(open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), "open /dev/net/tun");
    ifreq request{};
    request.ifr_flags = IFF_TUN | IFF_NO_PI;
    std::strncpy(request.ifr_name, kDevice, IFNAMSIZ - 1);
    checked(ioctl(device, TUNSETIFF, &request), "make a TUN device");
    const int control = checked(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "open a socket");
    if (access(kNoIpv6, F_OK) == 0) {
        write_setting(kNoIpv6, "1");  // nothing crosses but what the tests send
    }
    set_address(control, SIOCSIFADDR, address);
    set_address(control, SIOCSIFNETMASK, "255.255.255.0");
    set_number(control, SIOCSIFMTU, mtu);
    set_number(control, SIOCSIFTXQLEN, kDeviceQueuePackets);
    bring_up(control, "lo");
    bring_up(control, kDevice);
    close(control);
    write_setting("/proc/sys/net/ipv4/tcp_rmem", kReceiveBuffer);
    write_setting("/proc/sys/net/ipv4/tcp_wmem", kSendBuffer);
    return {name_space, device};
}

struct Settings {
    Nanoseconds delay{0};
    double loss = 0.0;
    double rate_bits_per_s = 0.0;
    double queue_bytes = 0.0;
    std::uint64_t seed = 0;
};

/// One way of the link; `run` belongs to its own thread, everything else to the one that takes commands.
class Way {
  public:
    Way(int source, int target, int mtu) : source_(source), target_(target), packet_(static_cast<std::size_t>(mtu)) {}

    void set(const Settings& settings) {
        const std::lock_guard lock(mutex_);
        settings_ = settings;
        generator_.seed(settings.seed);
    }

    void set_up(bool is_up) {
        const std::lock_guard lock(mutex_);
        is_up_ = is_up;
        left_ = -1;
        if (!is_up) {
            cut_ += static_cast<long long>(queue_.size());
            queue_.clear();
        }
    }

    void down_after(long long packets) {
        const std::lock_guard lock(mutex_);
        left_ = packets;
    }

    std::string count() {
        const std::lock_guard lock(mutex_);
        std::ostringstream line;
        line << forwarded_ << ' ' << lost_ << ' ' << overflowed_ << ' ' << cut_ << ' ' << forwarded_bytes_ << ' '
             << (is_up_ ? 1 : 0);
        return line.str();
    }

    void run(const std::atomic<bool>& is_over) {
        while (!is_over) {
            Nanoseconds wait = kLongestSleep;
            bool has_more = false;
            {
                const std::lock_guard lock(mutex_);
                deliver();
                has_more = take();
                deliver();
                if (!queue_.empty()) {
                    wait = std::min<Nanoseconds>(wait, queue_.front().due - Clock::now());
                }
            }
            if (has_more || wait <= Nanoseconds::zero()) {
                continue;
            }
            pollfd readable{source_, POLLIN, 0};
            const timespec limit{0, static_cast<long>(wait.count())};
            ppoll(&readable, 1, &limit, nullptr);
        }
    }

  private:
    struct Packet {
        Clock::time_point due;
        std::vector<char> bytes;
    };

    void deliver() {
        const auto now = Clock::now();
        while (!queue_.empty() && queue_.front().due <= now) {
            const Packet& packet = queue_.front();
            // A device that takes nothing has lost the packet, as any link may.
            if (write(target_, packet.bytes.data(), packet.bytes.size()) < 0) {
                ++overflowed_;
            } else {
                ++forwarded_;
                forwarded_bytes_ += static_cast<long long>(packet.bytes.size());
            }
            queue_.pop_front();
        }
    }

    /// Take what has come; whether there may be more.
    bool take() {
        for (int number = 0; number < kPacketsAtOnce; ++number) {
            const ssize_t size = read(source_, packet_.data(), packet_.size());
            if (size <= 0) {
                return false;
            }
            admit(static_cast<std::size_t>(size));
        }
        return true;
    }

    void admit(std::size_t size) {
        if (left_ >= 0 && left_-- == 0) {
            is_up_ = false;
        }
        if (!is_up_) {
            ++cut_;
            return;
        }
        // Drawn for every packet: which ones are lost depends on their number alone.
        if (std::uniform_real_distribution<double>(0.0, 1.0)(generator_) < settings_.loss) {
            ++lost_;
            return;
        }
        const auto now = Clock::now();
        busy_until_ = std::max(busy_until_, now);
        if (settings_.rate_bits_per_s > 0.0) {
            const double waiting_s = std::chrono::duration<double>(busy_until_ - now).count();
            if (waiting_s * settings_.rate_bits_per_s / 8 > settings_.queue_bytes) {
                ++overflowed_;
                return;
            }
            const double seconds = static_cast<double>(size) * 8 / settings_.rate_bits_per_s;
            busy_until_ += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
        }
        auto due = busy_until_ + settings_.delay;
        if (!queue_.empty()) {
            due = std::max(due, queue_.back().due);  // a delay that became shorter reorders nothing
        }
        queue_.push_back({due, {packet_.begin(), packet_.begin() + static_cast<std::ptrdiff_t>(size)}});
    }

    const int source_;
    const int target_;
    std::vector<char> packet_;
    std::mutex mutex_;
    Settings settings_;
    std::mt19937_64 generator_;
    bool is_up_ = true;
    long long left_ = -1;
    Clock::time_point busy_until_{};
    std::deque<Packet> queue_;
    long long forwarded_ = 0;
    long long lost_ = 0;
    long long overflowed_ = 0;
    long long cut_ = 0;
    long long forwarded_bytes_ = 0;
};

std::string obey(const std::string& line, Way& ab, Way& ba) {
    std::istringstream words(line);
    std::string what;
    std::string which;
    words >> what >> which;
    if (which != "ab" && which != "ba") {
        return "unknown way " + which;
    }
    Way& way = which == "ab" ? ab : ba;
    if (what == "set") {
        long long delay_us = 0;
        double loss_ppm = 0;
        Settings settings;
        words >> delay_us >> loss_ppm >> settings.rate_bits_per_s >> settings.queue_bytes >> settings.seed;
        if (!words) {
            return "malformed " + line;
        }
        settings.delay = std::chrono::microseconds(delay_us);
        settings.loss = loss_ppm / 1e6;
        way.set(settings);
    } else if (what == "down" || what == "up") {
        way.set_up(what == "up");
    } else if (what == "down_after") {
        long long packets = 0;
        words >> packets;
        way.down_after(packets);
    } else if (what == "count") {
        return way.count();
    } else {
        return "unknown command " + what;
    }
    return "ok";
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::cout << "usage: emulator MTU" << std::endl;
        return 2;
    }
    const int mtu = std::atoi(argv[1]);
    prctl(PR_SET_TIMERSLACK, 1UL);
    const Host a = make_host("10.78.0.1", mtu);
    const Host b = make_host("10.78.0.2", mtu);
    Way ab(a.device, b.device, mtu);
    Way ba(b.device, a.device, mtu);
    std::atomic<bool> is_over{false};
    std::thread carries_ab([&] { ab.run(is_over); });
    std::thread carries_ba([&] { ba.run(is_over); });
    std::cout << "ready " << a.name_space << ' ' << b.name_space << std::endl;
    for (std::string line; std::getline(std::cin, line);) {
        std::cout << obey(line, ab, ba) << std::endl;
    }
    is_over = true;
    carries_ab.join();
    carries_ba.join();
}
