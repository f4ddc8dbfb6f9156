#include "../net/stream.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <vector>

#include "../net/error.h"
#include "../net/frame.h"
#include "../net/socket_information.h"
#include "bindings.h"
#include "gil.h"
#include "value_buffer.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

const char* error_name(net::Fault fault) {
    switch (fault) {
        case net::Fault::protocol:
            return "ProtocolError";
        case net::Fault::mismatch:
            return "PeerMismatchError";
        case net::Fault::peer_gone:
            return "PeerGoneError";
        case net::Fault::deadline:
            return "DeadlineError";
        case net::Fault::local:
            break;
    }
    return "TransportError";
}

void translate(const std::exception_ptr& thrown, void*) {
    try {
        std::rethrow_exception(thrown);
    } catch (const net::NetError& error) {
        const nb::object type = nb::module_::import_("kvstore.errors").attr(error_name(error.fault()));
        PyErr_SetString(type.ptr(), error.what());
    }
}

void send(net::Stream& stream, nb::sequence buffers) {
    std::deque<ValueBuffer> held;
    std::vector<iovec> parts;
    for (const nb::handle object : buffers) {
        const ValueBuffer& buffer = held.emplace_back(object);
        if (buffer.size_bytes() != 0) {
            parts.push_back({buffer.data(), buffer.size_bytes()});
        }
    }
    const GilReleased released;
    stream.send(parts);
}

nb::bytes receive_header(net::Stream& stream, double deadline_s) {
    net::HeaderBytes bytes;
    {
        const GilReleased released;
        bytes = stream.receive_header(net::moment_of(deadline_s));
    }
    return nb::bytes(bytes.data(), bytes.size());
}

void receive_into(net::Stream& stream, nb::handle into) {
    const ValueBuffer buffer(into, PyBUF_WRITABLE);
    const GilReleased released;
    stream.receive(buffer.data(), buffer.size_bytes());
}

bool wait_readable(net::Stream& stream, double deadline_s) {
    const GilReleased released;
    return stream.wait_readable(net::moment_of(deadline_s));
}

nb::bytes pack_frame_header(int kind, int flags, std::uint64_t epoch, std::uint64_t counter, std::uint64_t generation,
                            std::uint32_t payload_bytes, std::uint32_t piece_count, std::uint32_t payload_crc32c) {
    const net::HeaderBytes bytes = net::pack_header({static_cast<net::Kind>(kind),
                                                     static_cast<std::uint8_t>(flags),
                                                     {epoch, counter},
                                                     generation,
                                                     payload_bytes,
                                                     piece_count,
                                                     payload_crc32c});
    return nb::bytes(bytes.data(), bytes.size());
}

nb::tuple parse_frame_header(nb::handle data) {
    const ValueBuffer buffer(data);
    if (buffer.size_bytes() != net::frame_header_bytes) {
        throw nb::value_error("a frame header has 64 bytes");
    }
    const auto* bytes = static_cast<const std::byte*>(buffer.data());
    const net::FrameHeader header =
        net::parse_header(std::span<const std::byte, net::frame_header_bytes>(bytes, net::frame_header_bytes));
    return nb::make_tuple(static_cast<int>(header.kind), static_cast<int>(header.flags), header.transfer.epoch,
                          header.transfer.counter, header.generation, header.payload_bytes, header.piece_count,
                          header.payload_crc32c);
}

nb::dict limits() {
    nb::dict limits;
    limits["FRAME_HEADER_BYTES"] = net::frame_header_bytes;
    limits["FRAME_PAYLOAD_BYTES_MAX"] = net::frame_payload_bytes_max;
    limits["FRAME_PIECES_MAX"] = net::frame_pieces_max;
    limits["RECORD_BYTES_MAX"] = net::record_bytes_max;
    limits["HANDOVER_PAYLOAD_BYTES_MAX"] = net::handover_payload_bytes_max;
    limits["OFFER_RECORDS_MAX"] = net::offer_records_max;
    return limits;
}

void bind_socket_information(nb::module_& module) {
    nb::class_<net::SocketInformation>(module, "SocketInformation",
                                       "What the kernel knows of a TCP connection; None is what it does not say.")
        .def_ro("round_trip_s", &net::SocketInformation::round_trip_s)
        .def_ro("round_trip_variation_s", &net::SocketInformation::round_trip_variation_s)
        .def_ro("round_trip_min_s", &net::SocketInformation::round_trip_min_s)
        .def_ro("delivery_bytes_per_s", &net::SocketInformation::delivery_bytes_per_s)
        .def_ro("is_app_limited", &net::SocketInformation::is_app_limited)
        .def_ro("retransmits", &net::SocketInformation::retransmits)
        .def_ro("segments_sent", &net::SocketInformation::segments_sent)
        .def_ro("sent_bytes", &net::SocketInformation::sent_bytes)
        .def_ro("acknowledged_bytes", &net::SocketInformation::acknowledged_bytes)
        .def_ro("retransmitted_bytes", &net::SocketInformation::retransmitted_bytes)
        .def_ro("window_segments", &net::SocketInformation::window_segments)
        .def_ro("in_flight_segments", &net::SocketInformation::in_flight_segments)
        .def_ro("segment_bytes", &net::SocketInformation::segment_bytes)
        .def_ro("unsent_bytes", &net::SocketInformation::unsent_bytes)
        .def_ro("busy_s", &net::SocketInformation::busy_s)
        .def_ro("receiver_limited_s", &net::SocketInformation::receiver_limited_s)
        .def_ro("buffer_limited_s", &net::SocketInformation::buffer_limited_s)
        .def_ro("congestion_control", &net::SocketInformation::congestion_control);
    module.def("socket_information", &net::read_socket_information, nb::arg("descriptor"),
               nb::sig("def socket_information(descriptor: int) -> SocketInformation"),
               "TCP_INFO and TCP_CONGESTION of a connected socket. Raises TransportError if it is none.");
}

}  // namespace

void bind_net_stream(nb::module_& module) {
    nb::register_exception_translator(&translate);
    bind_socket_information(module);
    module.def("pack_frame_header", &pack_frame_header, nb::arg("kind"), nb::arg("flags"), nb::arg("epoch"),
               nb::arg("counter"), nb::arg("generation"), nb::arg("payload_bytes"), nb::arg("piece_count"),
               nb::arg("payload_crc32c"),
               nb::sig("def pack_frame_header(kind: int, flags: int, epoch: int, counter: int, generation: int, "
                       "payload_bytes: int, piece_count: int, payload_crc32c: int) -> bytes"),
               "The 64 bytes of a frame header; raises ProtocolError beyond the limits.");
    module.def("parse_frame_header", &parse_frame_header, nb::arg("data"),
               nb::sig("def parse_frame_header(data: Buffer) -> tuple[int, int, int, int, int, int, int, int]"),
               "The fields of a frame header after all checks, in the order of `pack_frame_header`.\n\n"
               "Raises ProtocolError or PeerMismatchError.");
    module.def("frame_limits", &limits, nb::sig("def frame_limits() -> dict[str, int]"),
               "The limits that frames are checked against, by their names in limits.py.");

    nb::class_<net::Stream>(module, "Stream",
                            "A connected stream socket. One thread receives, any sends whole frames, any closes.\n\n"
                            "Owns the descriptor. Waits release the GIL and end at the no-progress deadline.")
        .def(nb::init<int, std::string, double>(), nb::arg("descriptor"), nb::arg("peer_address"),
             nb::arg("progress_deadline_s"))
        .def("send", &send, nb::arg("buffers"),
             "Send all bytes of all buffers as one unit. Raises PeerGoneError, TransportError; closed then.")
        .def("receive_header", &receive_header, nb::arg("deadline_s"),
             "64 bytes, by a moment of time.monotonic(). Raises DeadlineError, PeerGoneError.")
        .def("receive_into", &receive_into, nb::arg("into"),
             "Fill a buffer; each slice has the no-progress deadline. Raises PeerGoneError, TransportError.")
        .def("wait_readable", &wait_readable, nb::arg("deadline_s"),
             "Whether there is something to receive, or the stream has ended, by a moment of time.monotonic().")
        .def_prop_ro("is_connected", &net::Stream::is_connected)
        .def("close", &net::Stream::close, "End the connection and every wait on it. Idempotent, from any thread.")
        .def_prop_rw("progress_deadline_s", &net::Stream::progress_deadline_s, &net::Stream::set_progress_deadline_s)
        .def_prop_ro("frames_arrived", &net::Stream::frames_arrived, "DATA frames that have arrived whole.")
        .def_prop_ro("last_sent_s", [](const net::Stream& stream) { return net::seconds_of(stream.last_sent()); })
        .def_prop_ro("last_received_s",
                     [](const net::Stream& stream) { return net::seconds_of(stream.last_received()); });
}

}  // namespace kvstore::bindings
