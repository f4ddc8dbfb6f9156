// The limit that transfers are compared with: memory to memory over plain TCP sockets, no headers, no checksums.
//
//     raw_sockets receive CONNECTIONS RECORD_BYTES RECORDS CONGESTION
//     raw_sockets send PORT CONNECTIONS RECORD_BYTES RECORDS CONGESTION
//
// CONGESTION is the name of an algorithm or `default`. The receiver prints its port; each line on the sender's standard
// input begins a round, and both print `seconds cpu_seconds` after it. A thread per connection on both sides; the
// records are dealt out in turn. Uses nothing of kvstore.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
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

sockaddr_in loopback(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    return address;
}

struct Load {
    std::size_t record_bytes;
    std::size_t records;
    std::vector<char> memory;

    Load(std::size_t bytes, std::size_t count) : record_bytes(bytes), records(count), memory(bytes * count, 1) {}
};

// The records of one connection.
std::vector<iovec> share(Load& load, std::size_t connection, std::size_t connections) {
    std::vector<iovec> parts;
    for (std::size_t record = connection; record < load.records; record += connections) {
        parts.push_back({load.memory.data() + record * load.record_bytes, load.record_bytes});
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

void print_round(std::chrono::steady_clock::time_point begin, double cpu_before) {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    std::printf("%.9f %.6f\n", elapsed.count(), cpu_seconds() - cpu_before);
    std::fflush(stdout);
}

void receive_rounds(const std::vector<int>& sockets, Load& load) {
    while (true) {
        char peeked = 0;
        if (recv(sockets[0], &peeked, 1, MSG_PEEK) != 1) {
            return;
        }
        const double cpu = cpu_seconds();
        const auto begin = std::chrono::steady_clock::now();
        on_all(sockets, [&](std::size_t i) {
            move_all(share(load, i, sockets.size()), read_bytes,
                     [&](msghdr& message) { return recvmsg(sockets[i], &message, 0); });
        });
        check(::send(sockets[0], "k", 1, 0) == 1, "acknowledge");
        print_round(begin, cpu);
    }
}

void send_rounds(const std::vector<int>& sockets, Load& load) {
    char line[16];
    while (std::fgets(line, sizeof(line), stdin) != nullptr) {
        const double cpu = cpu_seconds();
        const auto begin = std::chrono::steady_clock::now();
        on_all(sockets, [&](std::size_t i) {
            move_all(share(load, i, sockets.size()), write_bytes,
                     [&](msghdr& message) { return sendmsg(sockets[i], &message, MSG_NOSIGNAL); });
        });
        char acknowledged = 0;
        check(recv(sockets[0], &acknowledged, 1, 0) == 1, "acknowledge");
        print_round(begin, cpu);
    }
}

}  // namespace

int main(int argc, char** argv) {
    const bool is_sender = argc > 1 && std::strcmp(argv[1], "send") == 0;
    if (argc != (is_sender ? 7 : 6)) {
        std::fprintf(stderr, "raw_sockets receive|send [PORT] CONNECTIONS RECORD_BYTES RECORDS CONGESTION\n");
        return 2;
    }
    char** rest = argv + (is_sender ? 3 : 2);
    const std::size_t connections = std::strtoul(rest[0], nullptr, 10);
    Load load(std::strtoul(rest[1], nullptr, 10), std::strtoul(rest[2], nullptr, 10));
    const std::string congestion = rest[3];
    std::vector<int> sockets;
    if (is_sender) {
        const sockaddr_in address = loopback(std::atoi(argv[2]));
        for (std::size_t i = 0; i < connections; ++i) {
            sockets.push_back(make_socket(congestion));
            check(connect(sockets.back(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0, "connect");
        }
        send_rounds(sockets, load);
        return 0;
    }
    const int listener = make_socket(congestion);
    sockaddr_in address = loopback(0);
    socklen_t length = sizeof(address);
    check(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0, "bind");
    check(listen(listener, 16) == 0, "listen");
    check(getsockname(listener, reinterpret_cast<sockaddr*>(&address), &length) == 0, "getsockname");
    std::printf("%d\n", ntohs(address.sin_port));
    std::fflush(stdout);
    for (std::size_t i = 0; i < connections; ++i) {
        sockets.push_back(accept(listener, nullptr, nullptr));
        check(sockets.back() >= 0, "accept");
    }
    receive_rounds(sockets, load);
    return 0;
}
