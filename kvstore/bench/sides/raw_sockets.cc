// The limit that transfers are compared with: memory to memory over plain TCP sockets, no headers, no checksums.
//
//     raw_sockets receive CONNECTIONS RECORD_BYTES RECORDS CONGESTION [HOST BATCHES SEED]
//     raw_sockets send [HOST:]PORT CONNECTIONS RECORD_BYTES RECORDS CONGESTION [BATCHES SEED]
//
// RECORD_BYTES and RECORDS are lists of as many numbers, separated by commas. CONGESTION is the name of an algorithm or
// `default`. The receiver prints its port; each line on the sender's standard input begins a round, and both print
// `seconds cpu_seconds` after it. Rounds take one batch of memory after the other. With a seed the sender's memory is
// random and its first line has a checksum per batch; the receiver appends that of what came to its first lines.
//
// A thread per connection on both sides; the records are dealt out in turn, and cut where there are fewer of them than
// connections. Uses nothing of kvstore.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t read_bytes = 256 << 10;
constexpr std::size_t write_bytes = 1 << 20;

[[noreturn]] void fail(const char* what) {
    std::perror(what);
    std::exit(1);
}

void check(bool holds, const char* what) {
    if (!holds) {
        fail(what);
    }
}

double cpu_seconds() {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& time) {
        return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

int make_socket(const std::string& congestion) {
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    check(fd >= 0, "socket");
    const int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
    if (congestion != "default") {
        check(setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion.data(),
                         static_cast<socklen_t>(congestion.size())) == 0,
              "TCP_CONGESTION");
    }
    return fd;
}

sockaddr_in address_of(const std::string& host, int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    check(inet_pton(AF_INET, host.c_str(), &address.sin_addr) == 1, "the host is no IPv4 address");
    return address;
}

std::vector<std::size_t> numbers(const std::string& list) {
    std::vector<std::size_t> found;
    for (std::size_t begin = 0; begin < list.size(); begin = list.find(',', begin), begin += begin < list.size()) {
        found.push_back(std::strtoul(list.c_str() + begin, nullptr, 10));
    }
    return found;
}

// The records of every batch, one after the other.
struct Load {
    std::vector<std::size_t> record_bytes;
    std::size_t batches;
    std::size_t batch_bytes = 0;
    std::vector<char> memory;

    Load(const std::string& sizes, const std::string& counts, std::size_t batch_count) : batches(batch_count) {
        const std::vector<std::size_t> each = numbers(sizes);
        const std::vector<std::size_t> times = numbers(counts);
        if (each.size() != times.size() || each.empty() || batches == 0) {
            std::fprintf(stderr, "as many RECORD_BYTES as RECORDS, and at least one batch\n");
            std::exit(2);
        }
        for (std::size_t i = 0; i < each.size(); ++i) {
            record_bytes.insert(record_bytes.end(), times[i], each[i]);
            batch_bytes += times[i] * each[i];
        }
        memory.assign(batches * batch_bytes, 0);
    }

    char* batch(std::size_t number) { return memory.data() + (number % batches) * batch_bytes; }

    // SplitMix64 (Steele et al., 2014).
    void fill(std::uint64_t seed) {
        std::uint64_t state = seed;
        for (std::size_t i = 0; i + 8 <= memory.size(); i += 8) {
            state += 0x9E3779B97F4A7C15U;
            std::uint64_t word = (state ^ (state >> 30U)) * 0xBF58476D1CE4E5B9U;
            word = (word ^ (word >> 27U)) * 0x94D049BB133111EBU;
            word ^= word >> 31U;
            std::memcpy(memory.data() + i, &word, 8);
        }
    }

    // FNV-1a over words instead of bytes: any changed, lost or misplaced word shows.
    std::uint64_t checksum(std::size_t number) {
        std::uint64_t sum = 0xCBF29CE484222325U;
        const char* data = batch(number);
        for (std::size_t i = 0; i + 8 <= batch_bytes; i += 8) {
            std::uint64_t word = 0;
            std::memcpy(&word, data + i, 8);
            sum = (sum ^ word) * 0x100000001B3U;
        }
        return sum;
    }
};

// What one connection carries of a batch.
std::vector<iovec> share(Load& load, std::size_t batch, std::size_t connection, std::size_t connections) {
    const std::size_t cuts = load.record_bytes.size() < connections ? connections : 1;
    std::vector<iovec> parts;
    char* data = load.batch(batch);
    std::size_t number = 0;
    for (const std::size_t bytes : load.record_bytes) {
        const std::size_t step = (bytes + cuts - 1) / cuts;
        for (std::size_t begin = 0; begin < bytes; begin += step) {
            if (number++ % connections == connection) {
                parts.push_back({data + begin, std::min(step, bytes - begin)});
            }
        }
        data += bytes;
    }
    return parts;
}

// The front of `parts`, at most `bytes_max` of it, moved on by what `move` says.
void move_all(std::vector<iovec> parts, std::size_t bytes_max, const std::function<ssize_t(msghdr&)>& move) {
    std::size_t first = 0;
    std::vector<iovec> window;
    while (first < parts.size()) {
        window.clear();
        std::size_t bytes = 0;
        for (std::size_t i = first; i < parts.size() && bytes < bytes_max && window.size() < 64; ++i) {
            const std::size_t length = std::min(parts[i].iov_len, bytes_max - bytes);
            window.push_back({parts[i].iov_base, length});
            bytes += length;
        }
        msghdr message{};
        message.msg_iov = window.data();
        message.msg_iovlen = window.size();
        const ssize_t moved = move(message);
        check(moved > 0, "send or receive");
        std::size_t left = static_cast<std::size_t>(moved);
        while (first < parts.size() && left >= parts[first].iov_len) {
            left -= parts[first++].iov_len;
        }
        if (left != 0) {
            parts[first].iov_base = static_cast<char*>(parts[first].iov_base) + left;
            parts[first].iov_len -= left;
        }
    }
}

void on_all(const std::vector<int>& sockets, const std::function<void(std::size_t)>& work) {
    std::vector<std::thread> threads;
    for (std::size_t i = 1; i < sockets.size(); ++i) {
        threads.emplace_back(work, i);
    }
    work(0);
    for (std::thread& thread : threads) {
        thread.join();
    }
}

using Moment = std::chrono::steady_clock::time_point;

std::string measured(Moment begin, double cpu_before) {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    char line[64];
    std::snprintf(line, sizeof(line), "%.9f %.6f", elapsed.count(), cpu_seconds() - cpu_before);
    return line;
}

void print(const std::string& line) {
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
}

void receive_rounds(const std::vector<int>& sockets, Load& load, bool is_checked) {
    for (std::size_t round = 0;; ++round) {
        char peeked = 0;
        if (recv(sockets[0], &peeked, 1, MSG_PEEK) != 1) {
            return;
        }
        const double cpu = cpu_seconds();
        const auto begin = std::chrono::steady_clock::now();
        on_all(sockets, [&](std::size_t i) {
            move_all(share(load, round, i, sockets.size()), read_bytes,
                     [&](msghdr& message) { return recvmsg(sockets[i], &message, 0); });
        });
        check(::send(sockets[0], "k", 1, 0) == 1, "acknowledge");
        std::string line = measured(begin, cpu);
        if (is_checked && round < load.batches) {
            line += ' ' + std::to_string(load.checksum(round));
        }
        print(line);
    }
}

void send_rounds(const std::vector<int>& sockets, Load& load) {
    char word[16];
    for (std::size_t round = 0; std::fgets(word, sizeof(word), stdin) != nullptr; ++round) {
        const double cpu = cpu_seconds();
        const auto begin = std::chrono::steady_clock::now();
        on_all(sockets, [&](std::size_t i) {
            move_all(share(load, round, i, sockets.size()), write_bytes,
                     [&](msghdr& message) { return sendmsg(sockets[i], &message, MSG_NOSIGNAL); });
        });
        char acknowledged = 0;
        check(recv(sockets[0], &acknowledged, 1, 0) == 1, "acknowledge");
        print(measured(begin, cpu));
    }
}

void send(const std::string& target, std::size_t connections, const std::string& congestion, Load& load,
          const char* seed) {
    if (seed != nullptr) {
        load.fill(std::strtoull(seed, nullptr, 10));
    }
    const std::size_t colon = target.find(':');
    const std::string host = colon == std::string::npos ? "127.0.0.1" : target.substr(0, colon);
    const std::string port = colon == std::string::npos ? target : target.substr(colon + 1);
    const sockaddr_in address = address_of(host, std::atoi(port.c_str()));
    std::vector<int> sockets;
    for (std::size_t i = 0; i < connections; ++i) {
        sockets.push_back(make_socket(congestion));
        check(connect(sockets.back(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0, "connect");
        const char number = static_cast<char>(i);
        check(::send(sockets.back(), &number, 1, MSG_NOSIGNAL) == 1, "say which connection it is");
    }
    if (seed != nullptr) {
        std::string sums;
        for (std::size_t batch = 0; batch < load.batches; ++batch) {
            sums += (batch == 0 ? "" : " ") + std::to_string(load.checksum(batch));
        }
        print(sums);
    }
    send_rounds(sockets, load);
}

void receive(const std::string& host, std::size_t connections, const std::string& congestion, Load& load,
             bool is_checked) {
    const int listener = make_socket(congestion);
    sockaddr_in address = address_of(host, 0);
    socklen_t length = sizeof(address);
    check(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0, "bind");
    check(listen(listener, 16) == 0, "listen");
    check(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) == 0, "getsockname");
    print(std::to_string(ntohs(address.sin_port)));
    // The first byte of a connection says which one it is: over a network they need not arrive in order.
    std::vector<int> sockets(connections, -1);
    for (std::size_t i = 0; i < connections; ++i) {
        const int fd = accept(listener, nullptr, nullptr);
        check(fd >= 0, "accept");
        const int yes = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
        unsigned char number = 0;
        check(recv(fd, &number, 1, MSG_WAITALL) == 1 && number < connections, "which connection it is");
        sockets[number] = fd;
    }
    receive_rounds(sockets, load, is_checked);
}

}  // namespace

int main(int argc, char** argv) {
    // Nobody waits for it any more when whoever started it has died.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const bool is_sender = argc > 1 && std::strcmp(argv[1], "send") == 0;
    const int needed = is_sender ? 7 : 6;
    const int more = is_sender ? 2 : 3;
    if (argc != needed && argc != needed + more) {
        std::fprintf(stderr,
                     "raw_sockets receive CONNECTIONS RECORD_BYTES RECORDS CONGESTION [HOST BATCHES SEED]\n"
                     "raw_sockets send [HOST:]PORT CONNECTIONS RECORD_BYTES RECORDS CONGESTION [BATCHES SEED]\n");
        return 2;
    }
    const bool is_checked = argc != needed;
    char** rest = argv + (is_sender ? 3 : 2);
    const std::size_t connections = std::strtoul(rest[0], nullptr, 10);
    const std::string congestion = rest[3];
    Load load(rest[1], rest[2], is_checked ? std::strtoul(argv[argc - 2], nullptr, 10) : 1);
    if (is_sender) {
        send(argv[2], connections, congestion, load, is_checked ? argv[argc - 1] : nullptr);
    } else {
        receive(is_checked ? rest[4] : "127.0.0.1", connections, congestion, load, is_checked);
    }
    return 0;
}
