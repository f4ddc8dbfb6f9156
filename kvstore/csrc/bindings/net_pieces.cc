#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../net/arrivals.h"
#include "../net/departures.h"
#include "../net/receive_pieces.h"
#include "../net/send_pieces.h"
#include "../net/traffic.h"
#include "bindings.h"
#include "gil.h"
#include "value_buffer.h"

namespace nb = nanobind;

namespace kvstore::bindings {
namespace {

using LayoutPointer = std::shared_ptr<net::PieceLayout>;

struct StopFlag {
    std::atomic<bool> is_set{false};
};

LayoutPointer make_layout(nb::handle offset_array, nb::handle size_array, std::uint64_t checksum_offset) {
    const ValueBuffer offset_buffer(offset_array);
    const ValueBuffer size_buffer(size_array);
    const auto offsets = offset_buffer.values<std::uint64_t>("offsets");
    const auto sizes = size_buffer.values<std::uint32_t>("sizes");
    if (offsets.size() != sizes.size()) {
        throw nb::value_error("a layout has as many offsets as sizes");
    }
    auto layout = std::make_shared<net::PieceLayout>();
    layout->offsets.assign(offsets.begin(), offsets.end());
    layout->sizes.assign(sizes.begin(), sizes.end());
    layout->checksum_offset = checksum_offset;
    return layout;
}

net::RecordPlace place_of(const LayoutPointer& layout, std::uint64_t address) {
    if (layout == nullptr || address == 0) {
        throw nb::value_error("a record has a layout and an address");
    }
    return {layout, reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address))};
}

// Arrivals

void add_records(net::Arrivals& arrivals, nb::handle numbers, const LayoutPointer& layout, nb::handle addresses) {
    const ValueBuffer number_buffer(numbers);
    const ValueBuffer address_buffer(addresses);
    const auto number = number_buffer.values<std::uint32_t>("numbers");
    const auto address = address_buffer.values<std::uint64_t>("addresses");
    if (number.size() != address.size()) {
        throw nb::value_error("there are as many numbers as addresses");
    }
    for (std::size_t i = 0; i < number.size(); ++i) {
        arrivals.add_record(number[i], place_of(layout, address[i]));
    }
}

nb::tuple tuple_of(const net::Settled& settled) {
    return nb::make_tuple(bytes_of(std::span<const net::PieceRow>(settled.damaged)), nb::cast(settled.completed));
}

nb::tuple settle(net::Arrivals& arrivals, nb::handle rows, nb::handle computed) {
    const ValueBuffer row_buffer(rows);
    const ValueBuffer computed_buffer(computed);
    const auto values = row_buffer.values<net::PieceRow>("rows");
    const auto checksums = computed_buffer.values<std::uint32_t>("computed");
    if (values.size() != checksums.size()) {
        throw nb::value_error("there are as many rows as checksums");
    }
    return tuple_of(arrivals.settle(values, checksums));
}

nb::tuple receive(net::Stream& stream, net::Stream& control, net::Arrivals& arrivals, std::uint64_t epoch,
                  std::uint64_t counter, std::uint64_t generation, double deadline_s, double linger_s, bool is_observed,
                  const StopFlag& stop, bool is_verified) {
    net::ReceiveOrder order;
    order.is_verified = is_verified;
    order.transfer = {epoch, counter};
    order.generation = generation;
    order.transfer_deadline = net::moment_of(deadline_s);
    order.linger_s = linger_s;
    order.is_observed = is_observed;
    net::Received result;
    {
        const GilReleased released;
        result = net::receive_pieces(stream, control, arrivals, order, stop.is_set);
    }
    return nb::make_tuple(static_cast<int>(result.event), nb::bytes(result.header.data(), result.header.size()),
                          result.reason, result.unread_bytes, tuple_of(result.settled),
                          bytes_of(std::span<const net::PieceRow>(result.rows)));
}

void bind_arrivals(nb::module_& module) {
    nb::class_<net::Arrivals>(module, "Arrivals",
                              "Which pieces of a transfer its receiver wants, is receiving and has. Any thread.\n\n"
                              "Rows are those of a DATA frame's table, ranges those of WANT, as buffers and bytes.")
        .def(nb::init<std::uint32_t>(), nb::arg("record_count"))
        .def("add_records", &add_records, nb::arg("numbers"), nb::arg("layout"), nb::arg("addresses"),
             "Records that are wanted: numbers in the offer (uint32) and addresses (uint64), [n] each.\n\n"
             "The caller keeps the memory in place while bytes move.")
        .def(
            "attach",
            [](net::Arrivals& arrivals, std::uint64_t epoch, std::uint64_t counter, std::uint64_t generation,
               std::uint64_t window_bytes) { arrivals.attach({epoch, counter}, generation, window_bytes); },
            nb::arg("epoch"), nb::arg("counter"), nb::arg("generation"), nb::arg("window_bytes"),
            "Only frames of this generation are taken from here on; credit counts anew.")
        .def(
            "claim",
            [](net::Arrivals& arrivals, nb::handle rows, std::optional<std::uint64_t> body_bytes) {
                const ValueBuffer buffer(rows);
                arrivals.claim(buffer.values<net::PieceRow>("rows"), body_bytes);
            },
            nb::arg("rows"), nb::arg("body_bytes").none(),
            "Check a piece table and mark its pieces as on the way. Raises ProtocolError; nothing is marked then.")
        .def(
            "lose",
            [](net::Arrivals& arrivals, nb::handle rows, std::uint64_t consumed_bytes) {
                const ValueBuffer buffer(rows);
                arrivals.lose(buffer.values<net::PieceRow>("rows"), consumed_bytes);
            },
            nb::arg("rows"), nb::arg("consumed_bytes"), "Claimed pieces did not arrive after all.")
        .def("settle", &settle, nb::arg("rows"), nb::arg("computed"),
             "Claimed pieces have arrived with these checksums (uint32): (damaged rows, completed records).")
        .def("consume", &net::Arrivals::consume, nb::arg("size_bytes"), nb::arg("is_quiet"),
             "Count received bytes; the new grant if one is due.")
        .def("grant_window", &net::Arrivals::grant_window, "Grant the whole window anew; the bytes granted.")
        .def_prop_ro("consumed_bytes", &net::Arrivals::consumed_bytes)
        .def(
            "note_seals",
            [](net::Arrivals& arrivals, nb::handle records) {
                const ValueBuffer buffer(records);
                return arrivals.note_seals(buffer.values<std::uint32_t>("records"));
            },
            nb::arg("records"), "SEAL of records (uint32): those that were wanted and are all there by now.")
        .def(
            "pending",
            [](const net::Arrivals& arrivals, std::uint32_t record) {
                const net::Pending pending = arrivals.pending(record);
                return nb::make_tuple(pending.pieces, pending.unasked, pending.is_seal_known);
            },
            nb::arg("record"), "(pieces that have not arrived, those of them neither on the way nor asked for again, whether SEAL came)")
        .def("missing_ranges",
             [](const net::Arrivals& arrivals) {
                 const std::vector<net::PieceRange> ranges = arrivals.missing_ranges();
                 return bytes_of(std::span<const net::PieceRange>(ranges));
             })
        .def("counts", [](const net::Arrivals& arrivals) {
            const net::ArrivalCounts counts = arrivals.counts();
            return nb::make_tuple(counts.bytes, counts.pieces, counts.damaged);
        });
    module.def("receive_pieces", &receive, nb::arg("stream"), nb::arg("control"), nb::arg("arrivals"), nb::arg("epoch"),
               nb::arg("counter"), nb::arg("generation"), nb::arg("deadline_s"), nb::arg("linger_s"),
               nb::arg("is_observed"), nb::arg("stop"), nb::kw_only(), nb::arg("is_verified") = true,
               nb::sig("def receive_pieces(stream: Stream, control: Stream, arrivals: Arrivals, epoch: int, counter: int, "
                       "generation: int, deadline_s: float, linger_s: float, is_observed: bool, stop: StopFlag, *, "
                       "is_verified: bool = True) -> tuple[int, bytes, str, int, tuple[bytes, list[int]], bytes]"),
               "Receive DATA frames straight into their records until there is something to tell; no GIL meanwhile.\n\n"
               "(event, header, reason, unread_bytes, (damaged rows, completed records), rows). The events\n"
               "are those of kvstore.transfer.native. The caller keeps the records in place.\n\n"
               "Raises:\n"
               "    PeerGoneError, ProtocolError, PeerMismatchError, TransportError: the stream is over.");
}

// Departures

std::unique_ptr<net::Departures> make_departures(const std::vector<LayoutPointer>& layouts, nb::handle layout_numbers,
                                                 nb::handle addresses) {
    const ValueBuffer number_buffer(layout_numbers);
    const ValueBuffer address_buffer(addresses);
    const auto numbers = number_buffer.values<std::uint32_t>("layout_numbers");
    const auto address = address_buffer.values<std::uint64_t>("addresses");
    if (numbers.size() != address.size()) {
        throw nb::value_error("there are as many layout numbers as addresses");
    }
    std::vector<net::RecordPlace> places;
    places.reserve(numbers.size());
    for (std::size_t i = 0; i < numbers.size(); ++i) {
        if (numbers[i] >= layouts.size()) {
            throw nb::value_error("a layout number is out of range");
        }
        places.push_back(place_of(layouts[numbers[i]], address[i]));
    }
    return std::make_unique<net::Departures>(std::move(places));
}

nb::tuple tuple_of(const net::Departing& frame) {
    return nb::make_tuple(bytes_of(std::span<const net::PieceRow>(frame.rows)), frame.body_bytes, frame.is_remote);
}

net::Departing departing_of(nb::handle rows) {
    const ValueBuffer buffer(rows);
    net::Departing frame;
    const auto values = buffer.values<net::PieceRow>("rows");
    frame.rows.assign(values.begin(), values.end());
    return frame;
}

nb::bytes next_seals(net::Departures& departures, std::size_t count_max) {
    struct Row {
        std::uint32_t record;
        std::uint32_t reserved;
        std::uint64_t cost_us;
    };
    static_assert(sizeof(Row) == 16);
    std::vector<Row> rows;
    for (const net::DueSeal& seal : departures.next_seals(count_max)) {
        rows.push_back({seal.record, 0, seal.cost_us});
    }
    return bytes_of(std::span<const Row>(rows));
}

nb::tuple send(net::Stream& stream, net::Departures& departures, std::uint64_t epoch, std::uint64_t counter,
               std::uint64_t generation, std::uint64_t frame_bytes_max, std::uint32_t unsent_bytes_max,
               std::uint32_t connection, double until_s, bool is_observed, const StopFlag& stop,
               net::Traffic::Flow& flow) {
    net::SendOrder order;
    order.transfer = {epoch, counter};
    order.generation = generation;
    order.frame_bytes_max = frame_bytes_max;
    order.unsent_bytes_max = unsent_bytes_max;
    order.connection = connection;
    order.until = net::moment_of(until_s);
    order.is_observed = is_observed;
    net::Sent result;
    {
        const GilReleased released;
        result = net::send_pieces(stream, departures, flow, order, stop.is_set);
    }
    return nb::make_tuple(result.frames, net::seconds_of(result.first_frame),
                          bytes_of(std::span<const net::PieceRow>(result.last.rows)), result.is_held);
}

void bind_departures(nb::module_& module) {
    nb::class_<net::Departures>(module, "Departures",
                                "What is left to send of a transfer. Any thread.\n\n"
                                "Rows are those of a DATA frame's table, ranges those of WANT, as buffers and bytes.")
        .def(nb::new_(&make_departures), nb::arg("layouts"), nb::arg("layout_numbers"), nb::arg("addresses"))
        .def(
            "pieces_whole",
            [](net::Departures& departures, std::uint32_t record, nb::handle pieces) {
                const ValueBuffer buffer(pieces);
                departures.pieces_whole(record, buffer.values<std::uint32_t>("pieces"));
            },
            nb::arg("record"), nb::arg("pieces"), "Pieces (uint32) of a record may be sent.")
        .def("record_sealed", &net::Departures::record_sealed, nb::arg("record"), nb::arg("cost_us"),
             "All pieces of a record are whole.")
        .def(
            "records_complete",
            [](net::Departures& departures, std::uint32_t first, nb::handle costs_us) {
                const ValueBuffer buffer(costs_us);
                departures.records_complete(first, buffer.values<std::uint64_t>("costs_us"));
            },
            nb::arg("first"), nb::arg("costs_us"), "Records `first` and on are whole and sealed, at costs (uint64).")
        .def(
            "want",
            [](net::Departures& departures, nb::handle ranges, bool is_again) {
                const ValueBuffer buffer(ranges);
                return departures.want(buffer.values<net::PieceRange>("ranges"), is_again);
            },
            nb::arg("ranges"), nb::arg("is_again"),
            "What the receiver lacks: in all, or in addition; the number of pieces. Raises ProtocolError.")
        .def("grant", &net::Departures::grant, nb::arg("granted_bytes"))
        .def(
            "take",
            [](net::Departures& departures, std::uint64_t frame_bytes_max, bool is_remote) {
                return tuple_of(departures.take({frame_bytes_max, is_remote, 0}));
            },
            nb::arg("frame_bytes_max"), nb::arg("is_remote"), "(rows, body bytes, is_remote) of the next frame.")
        .def(
            "sent",
            [](net::Departures& departures, nb::handle rows) {
                departures.sent(departing_of(rows));
            },
            nb::arg("rows"), "A frame that was taken has left.")
        .def(
            "unsent",
            [](net::Departures& departures, nb::handle rows) {
                departures.unsent(departing_of(rows), 0);
            },
            nb::arg("rows"), "A frame that was taken did not leave.")
        .def("lost", &net::Departures::lost, nb::arg("connection"), nb::arg("frames_arrived"),
             "What a further connection took and did not deliver is wanted again; the number of pieces.")
        .def_prop_ro("has_left", &net::Departures::has_left)
        .def_prop_ro("left_bytes", &net::Departures::left_bytes, "Bytes of wanted pieces that no frame has taken.")
        .def("next_seals", &next_seals, nb::arg("count_max"), "Rows of SEAL that are due.")
        .def_prop_ro("pieces_sent", &net::Departures::pieces_sent)
        .def("bytes_sent_by_record", [](const net::Departures& departures) {
            const std::vector<std::uint64_t> bytes = departures.bytes_sent_by_record();
            return bytes_of(std::span<const std::uint64_t>(bytes));
        });
    module.def("send_pieces", &send, nb::arg("stream"), nb::arg("departures"), nb::arg("epoch"), nb::arg("counter"),
               nb::arg("generation"), nb::arg("frame_bytes_max"), nb::arg("unsent_bytes_max"), nb::arg("connection"),
               nb::arg("until_s"), nb::arg("is_observed"), nb::arg("stop"), nb::arg("flow"),
               nb::sig("def send_pieces(stream: Stream, departures: Departures, epoch: int, counter: int, generation: int, "
                       "frame_bytes_max: int, unsent_bytes_max: int, connection: int, until_s: float, is_observed: bool, stop: StopFlag, "
                       "flow: TrafficFlow) -> tuple[int, float, bytes, bool]"),
               "Send DATA frames straight from their records until nothing can be sent; no GIL meanwhile.\n\n"
               "(frames, when the first had left, rows of the last one if observed, whether it was other transfers' turn\n"
               "until the end). The caller keeps the records in place. `unsent_bytes_max` of what was sent may wait in the\n"
               "kernel; 0 leaves it to the kernel.\n\n"
               "Raises:\n"
               "    PeerGoneError, TransportError: the stream is over.");
}

}  // namespace

void bind_net_pieces(nb::module_& module) {
    nb::class_<StopFlag>(module, "StopFlag", "Tells a native loop to return at the next frame. Any thread.")
        .def(nb::init<>())
        .def("set", [](StopFlag& flag) { flag.is_set.store(true, std::memory_order_release); })
        .def("clear", [](StopFlag& flag) { flag.is_set.store(false, std::memory_order_release); })
        .def_prop_ro("is_set", [](const StopFlag& flag) { return flag.is_set.load(std::memory_order_acquire); });
    nb::class_<net::PieceLayout>(module, "PieceLayout", "Where the pieces of one class of records lie. Immutable.")
        .def(nb::new_(&make_layout), nb::arg("offsets"), nb::arg("sizes"), nb::arg("checksum_offset"))
        .def_prop_ro("piece_count", &net::PieceLayout::piece_count);
    nb::class_<net::Traffic>(module, "Traffic", "Whose turn it is, among the transfers of one sender. Any thread.")
        .def(nb::new_([] { return std::make_shared<net::Traffic>(); }));
    nb::class_<net::Traffic::Flow>(module, "TrafficFlow",
                                   "One transfer among others: its priority (0 first) and its peer. Any thread.\n\n"
                                   "A background flow leaves few bytes in the kernel, so that others can overtake it. A paced one holds up\n"
                                   "nobody.")
        .def(nb::init<std::shared_ptr<net::Traffic>, std::uint8_t, bool, bool, const std::string&>(), nb::arg("traffic"),
             nb::arg("priority"), nb::arg("is_background"), nb::arg("is_paced"), nb::arg("peer"));
    bind_arrivals(module);
    bind_departures(module);
}

}  // namespace kvstore::bindings
