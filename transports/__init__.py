"""The transports that come with kvstore: one folder each, all behind `kvstore.abc.transport`.

They are found by the entry-point group `kvstore.transports`, as any other package's are.
"""
