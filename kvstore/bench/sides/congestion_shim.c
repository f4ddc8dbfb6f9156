/* Gives the TCP sockets of a program that cannot be told the congestion control that a benchmark compares.

   Preloaded (LD_PRELOAD) into the processes of such a side; KVSTORE_BENCH_CONGESTION names the algorithm. Sockets that a
   listener accepts inherit its own. A name that this process may not use leaves the system's: what the sockets have in
   the end is read from them (kvstore/bench/sides/network.py). */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

typedef int socket_function(int, int, int);

int socket(int domain, int type, int protocol) {
  socket_function *next;
  *(void **)&next = dlsym(RTLD_NEXT, "socket"); /* as POSIX has it: ISO C has no cast for this */
  int descriptor = next(domain, type, protocol);
  const char *name = getenv("KVSTORE_BENCH_CONGESTION");
  int is_stream = (type & ~(SOCK_NONBLOCK | SOCK_CLOEXEC)) == SOCK_STREAM;
  int is_tcp = (domain == AF_INET || domain == AF_INET6) && is_stream && (protocol == 0 || protocol == IPPROTO_TCP);
  if (descriptor >= 0 && is_tcp && name != NULL) {
    int before = errno;
    setsockopt(descriptor, IPPROTO_TCP, TCP_CONGESTION, name, (socklen_t)strlen(name));
    errno = before;
  }
  return descriptor;
}
