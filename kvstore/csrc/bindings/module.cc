#include "../checksum/crc32c.h"
#include "../copy/copy_path.h"
#include "bindings.h"

NB_MODULE(_native, module) {
    module.doc() =
        "Arena, checksums, strided copies, sockets: the parts of kvstore that touch every byte or every record.";
    module.attr("__version__") = KVSTORE_VERSION;
    // A path forced by the environment that this CPU cannot run fails the import, not the first call.
    kvstore::active_crc32c_path();
    kvstore::bindings::bind_arena(module);
    kvstore::active_copy_path();
    kvstore::bindings::bind_checksum(module);
    kvstore::bindings::bind_copy(module);
    kvstore::bindings::bind_cpu(module);
    kvstore::bindings::bind_record(module);
    kvstore::bindings::bind_index(module);
    kvstore::bindings::bind_io(module);
    kvstore::bindings::bind_net_stream(module);
    kvstore::bindings::bind_net_pieces(module);
}
