/*
 * CRC-32C, and the checksum of metadata pages.
 *
 * Threads: the table is made when the module is loaded, and is only read afterwards.
 */
#include "native.h"

static uint32_t crc_table[256];

__attribute__((constructor)) static void crc_init(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t c = i;

		for (int k = 0; k < 8; k++)
			c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
		crc_table[i] = c;
	}
}

static uint32_t crc_soft(uint32_t c, const uint8_t *p, uint64_t n)
{
	while (n--)
		c = c >> 8 ^ crc_table[(c ^ *p++) & 0xff];
	return c;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2")))
static uint32_t crc_hard(uint32_t crc, const uint8_t *p, uint64_t n)
{
	uint64_t c = crc;

	for (; n >= 8; n -= 8, p += 8) {
		uint64_t w;

		memcpy(&w, p, 8);
		c = __builtin_ia32_crc32di(c, w);
	}
	while (n--)
		c = __builtin_ia32_crc32qi((uint32_t)c, *p++);
	return (uint32_t)c;
}
#endif

/* RFC 3720's CRC32C; pass 0 to start, a former result to go on. */
uint32_t pk_crc32c(uint32_t crc, const uint8_t *p, uint64_t n)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("sse4.2"))
		return ~crc_hard(~crc, p, n);
#endif
	return ~crc_soft(~crc, p, n);
}

/* The checksum of a metadata page: its own field (bytes 4 to 7) counts as zero. */
uint32_t pk_page_crc(const uint8_t *page)
{
	uint8_t head[8];

	memcpy(head, page, 4);
	memset(head + 4, 0, 4);
	return pk_crc32c(pk_crc32c(0, head, 8), page + 8, PAGE - 8);
}
