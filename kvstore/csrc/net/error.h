// What can go wrong on a connection, by who is at fault.
#pragma once

#include <stdexcept>
#include <string>

namespace kvstore::net {

enum class Fault {
    protocol,   // the peer sent what no peer may send
    mismatch,   // an intact frame of another protocol version
    peer_gone,  // the stream has ended, or nothing moved for the no-progress deadline
    deadline,   // nothing came in time; the stream is intact and goes on
    local,      // this machine: no memory, a bad descriptor
};

class NetError : public std::runtime_error {
  public:
    NetError(Fault fault, const std::string& message) : std::runtime_error(message), fault_(fault) {}
    Fault fault() const { return fault_; }

  private:
    Fault fault_;
};

}  // namespace kvstore::net
