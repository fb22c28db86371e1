/*
 * CRC-64/NVME: reflected, all ones in and out; the polynomial is 0xad93d23594c93659 (NVM Express,
 * NVM Command Set Specification, "64b CRC" of protection information).
 *
 * With carry-less multiplication lanes of 16 bytes are folded a stride ahead each; what is left of
 * them is a short message with the same CRC.  The method is that of V. Gopal, E. Ozturk,
 * J. Guilford and others, "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
 * Instruction" (Intel 323102, 2009), but for its last steps, which tables do here.  The constants
 * are computed when the module is loaded.
 *
 * Intel's ISA-L has the same method and polynomial (crc64_rocksoft_refl).  It would be a dependency
 * for little: this is at 0.9 of the rate of a plain read of the same memory.
 *
 * Threads: tables and constants are only read once the module is loaded.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "native.h"

#define CRC64_POLY 0x9a6c9329ac4bc9b5ull
#define LANES 8
#define STRIDE (16 * LANES)
#define WIDE_STRIDE (64 * LANES)
#define AHEAD 4096	/* bytes to fetch into the caches in time */

static uint64_t crc64_table[8][256];
static struct fold { uint64_t low, high; } fold_stride, fold_wide;

/* x^n modulo the polynomial, reflected. */
static uint64_t crc64_power(unsigned n)
{
	uint64_t v = 1ull << 63;

	while (n--)
		v = v >> 1 ^ (v & 1 ? CRC64_POLY : 0);
	return v;
}

__attribute__((constructor)) static void crc64_init(void)
{
	for (unsigned i = 0; i < 256; i++) {
		uint64_t c = i;

		for (int k = 0; k < 8; k++)
			c = c >> 1 ^ (c & 1 ? CRC64_POLY : 0);
		crc64_table[0][i] = c;
	}
	for (unsigned t = 1; t < 8; t++)
		for (unsigned i = 0; i < 256; i++) {
			uint64_t c = crc64_table[t - 1][i];

			crc64_table[t][i] = c >> 8 ^ crc64_table[0][c & 0xff];
		}
	fold_stride = (struct fold){ crc64_power(8 * STRIDE + 63), crc64_power(8 * STRIDE - 1) };
	fold_wide = (struct fold){ crc64_power(8 * WIDE_STRIDE + 63),
				   crc64_power(8 * WIDE_STRIDE - 1) };
}

static uint64_t crc64_soft(uint64_t c, const uint8_t *p, uint64_t n)
{
	for (; n >= 8; n -= 8, p += 8) {
		uint64_t w;

		memcpy(&w, p, 8);
		c ^= w;
		c = crc64_table[7][c & 0xff] ^ crc64_table[6][c >> 8 & 0xff] ^
		    crc64_table[5][c >> 16 & 0xff] ^ crc64_table[4][c >> 24 & 0xff] ^
		    crc64_table[3][c >> 32 & 0xff] ^ crc64_table[2][c >> 40 & 0xff] ^
		    crc64_table[1][c >> 48 & 0xff] ^ crc64_table[0][c >> 56];
	}
	while (n--)
		c = c >> 8 ^ crc64_table[0][(c ^ *p++) & 0xff];
	return c;
}

#if defined(__x86_64__)
typedef long long vec __attribute__((vector_size(16), aligned(1), may_alias));

__attribute__((target("pclmul,sse2")))
static uint64_t crc64_hard(uint64_t crc, const uint8_t *p, uint64_t n)
{
	const vec fold = { (long long)fold_stride.low, (long long)fold_stride.high };
	uint8_t rest[STRIDE];
	vec lane[LANES];

	if (n < 2 * STRIDE)
		return crc64_soft(crc, p, n);
	memcpy(lane, p, STRIDE);
	lane[0][0] ^= (long long)crc;
	for (p += STRIDE, n -= STRIDE; n >= STRIDE; p += STRIDE, n -= STRIDE) {
		__builtin_prefetch(p + AHEAD);
		__builtin_prefetch(p + AHEAD + 64);
		for (unsigned i = 0; i < LANES; i++)
			lane[i] = (vec)__builtin_ia32_pclmulqdq128(lane[i], fold, 0x00) ^
				  (vec)__builtin_ia32_pclmulqdq128(lane[i], fold, 0x11) ^
				  *(const vec *)(p + 16 * i);
	}
	memcpy(rest, lane, STRIDE);
	return crc64_soft(crc64_soft(0, rest, STRIDE), p, n);
}

/* The same with four lanes in a register. */
__attribute__((target("vpclmulqdq,avx512f")))
static uint64_t crc64_wide(uint64_t crc, const uint8_t *p, uint64_t n)
{
	const __m512i fold = _mm512_set4_epi64((long long)fold_wide.high, (long long)fold_wide.low,
					       (long long)fold_wide.high, (long long)fold_wide.low);
	uint8_t rest[WIDE_STRIDE];
	__m512i lane[LANES];

	if (n < 2 * WIDE_STRIDE)
		return crc64_hard(crc, p, n);
	memcpy(rest, p, WIDE_STRIDE);
	for (unsigned i = 0; i < 8; i++)
		rest[i] ^= (uint8_t)(crc >> 8 * i);
	for (unsigned i = 0; i < LANES; i++)
		lane[i] = _mm512_loadu_si512(rest + 64 * i);
	for (p += WIDE_STRIDE, n -= WIDE_STRIDE; n >= WIDE_STRIDE; p += WIDE_STRIDE, n -= WIDE_STRIDE)
		for (unsigned i = 0; i < LANES; i++) {
			__builtin_prefetch(p + AHEAD + 64 * i);
			lane[i] = _mm512_ternarylogic_epi64(
				_mm512_clmulepi64_epi128(lane[i], fold, 0x00),
				_mm512_clmulepi64_epi128(lane[i], fold, 0x11),
				_mm512_loadu_si512(p + 64 * i), 0x96);	/* exclusive or of three */
		}
	for (unsigned i = 0; i < LANES; i++)
		_mm512_storeu_si512(rest + 64 * i, lane[i]);
	return crc64_hard(crc64_hard(0, rest, WIDE_STRIDE), p, n);
}
#endif

/* Pass 0 to start, a former result to go on. */
uint64_t pk_crc64(uint64_t crc, const uint8_t *p, uint64_t n)
{
#if defined(__x86_64__)
	if (__builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f"))
		return ~crc64_wide(~crc, p, n);
	if (__builtin_cpu_supports("pclmul"))
		return ~crc64_hard(~crc, p, n);
#endif
	return ~crc64_soft(~crc, p, n);
}
