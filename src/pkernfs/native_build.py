"""Builds ``pkernfs._native`` from native.c, in cffi's API mode."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()

ffibuilder.cdef(
    """
    void pk_trace_start(void);
    uint64_t pk_trace_stop(void);
    const uint8_t *pk_trace_data(void);

    void pk_copy(uint8_t *base, uint64_t offset, const uint8_t *data, uint64_t n);
    void pk_zero(uint8_t *base, uint64_t offset, uint64_t n);
    void pk_store_u64(uint8_t *base, uint64_t offset, uint64_t value);
    int pk_is_zero(const uint8_t *p, uint64_t n);

    uint32_t pk_crc32c(uint32_t crc, const uint8_t *p, uint64_t n);
    uint32_t pk_page_crc(const uint8_t *page);

    int64_t pk_commit(uint8_t *base, uint64_t journal, uint64_t capacity, uint64_t sequence,
                      const uint8_t *uuid, uint8_t *images, const uint64_t *numbers,
                      const uint8_t *fresh, uint64_t n);
    int pk_journal_state(const uint8_t *base, uint64_t size, uint64_t journal,
                         uint64_t capacity, const uint8_t *uuid);
    void pk_journal_replay(uint8_t *base, uint64_t journal);
    void pk_journal_clear(uint8_t *base, uint64_t journal);

    uint8_t *pk_map(int fd, uint64_t size, uint64_t align, int writable, int *error);
    void pk_unmap(uint8_t *map, uint64_t size);
    int pk_msync(uint8_t *map, uint64_t size);
    uint64_t pk_fs_magic(int fd);
    """
)

ffibuilder.set_source(
    "pkernfs._native",
    Path(__file__).with_name("native.c").read_text(),
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-std=gnu11"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(Path(__file__).parent.parent), verbose=True)
