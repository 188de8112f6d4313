# cython: language_level=3
"""Numbers as they lie in bytes: `u` with the lowest first, as in BSON and in what is packed; `be` as in PostgreSQL's."""

from libc.stdint cimport uint32_t, uint64_t


cdef inline uint32_t u32(const unsigned char *d) noexcept nogil:
    return <uint32_t> d[0] | <uint32_t> d[1] << 8 | <uint32_t> d[2] << 16 | <uint32_t> d[3] << 24


cdef inline uint64_t u64(const unsigned char *d) noexcept nogil:
    return <uint64_t> u32(d) | <uint64_t> u32(d + 4) << 32


cdef inline uint32_t be32(const unsigned char *d) noexcept nogil:
    return <uint32_t> d[0] << 24 | <uint32_t> d[1] << 16 | <uint32_t> d[2] << 8 | <uint32_t> d[3]


cdef inline uint64_t be64(const unsigned char *d) noexcept nogil:
    return <uint64_t> be32(d) << 32 | <uint64_t> be32(d + 4)
