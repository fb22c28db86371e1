/*
 * Digests of many parts of a region in one call: CRC-64 of chunks, checksums of pages.
 *
 * Threads: any, and several at once; digests of one region are made by all cores.
 */
#include "native.h"

static int digest_parts(const uint8_t *base, uint64_t size, const uint64_t *parts, uint64_t n,
			uint64_t *digest)
{
	static const uint8_t zeros[16 * PAGE];
	uint64_t crc = 0;

	for (uint64_t i = 0; i < n; i++) {
		uint64_t offset = parts[2 * i], left = parts[2 * i + 1];

		if (offset != ~0ull) {
			if (offset > size || left > size - offset)
				return -1;
			crc = pk_crc64(crc, base + offset, left);
			continue;
		}
		while (left) {
			uint64_t step = left < sizeof(zeros) ? left : sizeof(zeros);

			crc = pk_crc64(crc, zeros, step);
			left -= step;
		}
	}
	*digest = crc;
	return 0;
}

/*
 * CRC-64 of n chunks, each of several parts of a region.  parts holds {offset, length} pairs, an
 * offset of ~0 standing for that many zeros; chunk i ends before part ends[i].  Returns the number
 * of the first chunk that was not done, n if all were: its memory is not there (*gone; a bus error:
 * pk_exit_on_bus_error), or else it is not inside size bytes.
 */
uint64_t pk_digest(const uint8_t *base, uint64_t size, const uint64_t *parts,
		   const uint64_t *ends, uint64_t n, uint64_t *digests, int *gone)
{
	volatile uint64_t done = 0;	/* as a jump back finds it */
	sigjmp_buf here;

	*gone = 0;
	if (sigsetjmp(here, 0)) {
		bus_error_guard = NULL;
		*gone = 1;
		return done;
	}
	bus_error_guard = &here;
	for (uint64_t i = 0, part = 0; i < n; part = ends[i++], done = i)
		if (digest_parts(base, size, parts + 2 * part, ends[i] - part, &digests[i]))
			break;
	bus_error_guard = NULL;
	return done;
}

/*
 * Checksums of n metadata pages, or unless slots is 0 of the sixteen 256-byte slots of each.  Where a
 * page says another one in its header it is the complement.  The caller has checked the numbers.
 */
void pk_page_sums(const uint8_t *base, const uint64_t *numbers, uint64_t n, int slots,
		  uint32_t *sums)
{
	for (uint64_t i = 0; i < n; i++) {
		const uint8_t *page = base + numbers[i] * PAGE;

		if (!slots) {
			uint32_t crc = pk_page_crc(page), said;

			memcpy(&said, page + 4, 4);
			*sums++ = said == crc ? crc : ~crc;
		}
		for (unsigned s = 0; slots && s < 16; s++)
			*sums++ = pk_crc32c(0, page + s * (PAGE / 16), PAGE / 16);
	}
}
