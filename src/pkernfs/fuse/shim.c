/* A layer between pyfuse3 and libfuse.
 *
 * It is loaded with RTLD_GLOBAL before pyfuse3, so that pyfuse3's call of fuse_session_new (or, from
 * libfuse 3.17 on, fuse_session_new_versioned) finds the functions below. They fill slots of the
 * operation table that pyfuse3 leaves empty, and call libfuse's own. After the mount, pk_attach puts
 * itself between libfuse and /dev/fuse, to
 *   - add capabilities to the reply to FUSE_INIT that the libfuse at hand has no names for,
 *   - note what libfuse does not hand on of a request (who asks; whether set-id bits must go),
 *   - serve two requests that not every libfuse knows: TMPFILE (7.37, Linux 6.2) has the form of
 *     CREATE, and is handed on as one, with a note; STATX (7.39, Linux 6.6), which has the birth
 *     time, is answered here,
 *   - pass shared mappings of a file through to another file (FUSE_PASSTHROUGH, 7.40, Linux 6.9):
 *     libfuse has it from 3.17 on, pyfuse3 not at all,
 *   - read without blocking, and for a moment without sleeping.
 * One thread serves requests, so the notes on the current request are plain statics.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define FUSE_USE_VERSION 35
#include <fuse_log.h>
#include <fuse_lowlevel.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

/* ------------------------------------------------------------------ the kernel's protocol */
/* The few parts of linux/fuse.h (7.40) that are used here, so that old headers will do. */

enum { OP_SETATTR = 4, OP_OPEN = 14, OP_WRITE = 16, OP_INIT = 26, OP_CREATE = 35,
       OP_FALLOCATE = 43, OP_COPY_FILE_RANGE = 47, OP_TMPFILE = 51, OP_STATX = 52 };

#define INIT_PARALLEL_DIROPS (UINT64_C(1) << 18)
#define INIT_AUTO_INVAL_DATA (UINT64_C(1) << 12)
#define INIT_CACHE_SYMLINKS (UINT64_C(1) << 23)
#define INIT_EXPLICIT_INVAL_DATA (UINT64_C(1) << 25)
#define INIT_HANDLE_KILLPRIV_V2 (UINT64_C(1) << 28)
#define INIT_EXT (UINT64_C(1) << 30)
#define INIT_DIRECT_IO_ALLOW_MMAP (UINT64_C(1) << 36)
#define INIT_PASSTHROUGH (UINT64_C(1) << 37)

#define SETATTR_KILL_SUIDGID (1u << 11) /* fuse_setattr_in.valid */
#define WRITE_KILL_SUIDGID (1u << 2)    /* fuse_write_in.write_flags */
#define OPEN_KILL_SUIDGID (1u << 0)     /* fuse_open_in.open_flags, fuse_create_in.open_flags */

#define FOPEN_DIRECT_IO (1u << 0) /* fuse_open_out.open_flags */
#define FOPEN_PASSTHROUGH (1u << 7)

struct in_header {
	uint32_t len, opcode;
	uint64_t unique, nodeid;
	uint32_t uid, gid, pid, padding;
};
struct init_in {
	uint32_t major, minor, max_readahead, flags, flags2;
};
struct init_out {
	uint32_t major, minor, max_readahead, flags;
	uint16_t max_background, congestion_threshold;
	uint32_t max_write, time_gran;
	uint16_t max_pages, map_alignment;
	uint32_t flags2, max_stack_depth, unused[6];
};
struct out_header {
	uint32_t len;
	int32_t error;
	uint64_t unique;
};
struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};
struct sx_time {
	int64_t seconds;
	uint32_t ns;
	int32_t reserved;
};
struct statx_out {
	uint64_t attr_valid;
	uint32_t attr_valid_ns, flags;
	uint64_t spare[2];
	/* struct fuse_statx */
	uint32_t mask, blksize;
	uint64_t attributes;
	uint32_t nlink, uid, gid;
	uint16_t mode, spare0;
	uint64_t ino, size, blocks, attributes_mask;
	struct sx_time atime, btime, ctime, mtime;
	uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
	uint64_t spare2[14];
};
_Static_assert(sizeof(struct statx_out) == 32 + 256, "struct fuse_statx_out");

#define STATX_BASIC_STATS_AND_BTIME 0xfffu

/* ------------------------------------------------------------------ state, read by shim.py */

struct pk_request pk_request;       /* the request being handled */
struct pk_negotiated pk_negotiated; /* what FUSE_INIT came to */
uint64_t pk_wanted;                 /* INIT flags to add if they are offered */
uint64_t pk_unwanted;               /* INIT flags to take out of libfuse's answer */
uint64_t pk_spin_ns;                /* how long a read looks for a request before it gives up */
int pk_idle;                        /* the last read found none: time to sleep */
int pk_tables;                      /* operation tables filled: 0 means pyfuse3 went round us */
int pk_take_writes;                 /* pk_on_write serves WRITE instead of pyfuse3 */
char *pk_mount_arg;                 /* a further argument for fuse_session_new, of any bytes */
uint64_t pk_backed_fh;              /* the handle that is being opened ... */
int32_t pk_backing_id;              /* ... is passed through to this backing file, unless 0 */

char pk_message[256];               /* libfuse's last words before pk_attach */

static struct fuse_session *session;
static uint64_t init_unique;
static int32_t reply_backing_id; /* of the reply to OPEN or CREATE that libfuse is writing, or 0 */

/* ------------------------------------------------------------------ added operations */

static void reply_count(fuse_req_t req, int64_t result)
{
	if (result >= 0)
		fuse_reply_write(req, result);
	else if (result != PK_LATER)
		fuse_reply_err(req, (int)-result);
}

static void op_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset,
		     struct fuse_file_info *fi)
{
	reply_count(req, pk_on_write(req, ino, (char *)data, size, offset, fi->writepage));
}

static void op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
			 struct fuse_file_info *fi)
{
	(void)fi;
	int64_t result = pk_on_fallocate(req, ino, mode, offset, length);
	if (result != PK_LATER)
		fuse_reply_err(req, (int)-result);
}

static void op_lseek(fuse_req_t req, fuse_ino_t ino, off_t offset, int whence,
		     struct fuse_file_info *fi)
{
	(void)fi;
	int64_t result = pk_on_lseek(ino, offset, whence);
	if (result >= 0)
		fuse_reply_lseek(req, result);
	else
		fuse_reply_err(req, (int)-result);
}

static void op_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in,
			       struct fuse_file_info *fi_in, fuse_ino_t ino_out, off_t off_out,
			       struct fuse_file_info *fi_out, size_t len, int flags)
{
	(void)fi_in, (void)fi_out;
	reply_count(req, flags ? -EINVAL
			       : pk_on_copy(req, ino_in, off_in, ino_out, off_out, len));
}

/*
 * The kernel may keep what it has read of a directory: every change of it goes through the kernel,
 * which then drops that.  pyfuse3 answers with the flags that it was handed.
 */
static void (*next_opendir)(fuse_req_t, fuse_ino_t, struct fuse_file_info *);

static void op_opendir(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	fi->cache_readdir = 1;
	fi->keep_cache = 1;
	next_opendir(req, ino, fi);
}

/* pyfuse3 looks at one of the flags only, and sets the attribute for both together. */
static void (*next_setxattr)(fuse_req_t, fuse_ino_t, const char *, const char *, size_t, int);

static void op_setxattr(fuse_req_t req, fuse_ino_t ino, const char *name, const char *value,
			size_t size, int flags)
{
	if (flags & XATTR_CREATE && flags & XATTR_REPLACE)
		fuse_reply_err(req, EINVAL);
	else
		next_setxattr(req, ino, name, value, size, flags);
}

/* The reply to a request whose callback answered PK_LATER. */
void pk_reply_later(void *req, int64_t result, int counted)
{
	if (counted)
		reply_count(req, result);
	else
		fuse_reply_err(req, (int)-result);
}

/* ------------------------------------------------------------------ session creation */

static int (*next_reply_open)(fuse_req_t, const struct fuse_file_info *);
static int (*next_reply_create)(fuse_req_t, const struct fuse_entry_param *,
				const struct fuse_file_info *);

static void *real(const char *name)
{
	static const char *const libraries[] = { "libfuse3.so.4", "libfuse3.so.3", "libfuse3.so" };
	void *f = dlsym(RTLD_NEXT, name);

	for (size_t i = 0; !f && i < sizeof libraries / sizeof *libraries; i++) {
		void *library = dlopen(libraries[i], RTLD_LAZY | RTLD_NOLOAD);
		if (library)
			f = dlsym(library, name);
	}
	return f;
}

static void fill(struct fuse_lowlevel_ops *to, const struct fuse_lowlevel_ops *from, size_t size,
		 struct fuse_args *args)
{
	memset(to, 0, sizeof *to);
	memcpy(to, from, size < sizeof *to ? size : sizeof *to);
	to->fallocate = op_fallocate;
	to->lseek = op_lseek;
	to->copy_file_range = op_copy_file_range;
	next_opendir = to->opendir;
	to->opendir = op_opendir;
	next_setxattr = to->setxattr;
	to->setxattr = op_setxattr;
	if (pk_take_writes) { /* the caller's buffer goes to Python as it is, without a copy */
		to->write = op_write;
		to->write_buf = NULL;
	}
	next_reply_open = real("fuse_reply_open");
	next_reply_create = real("fuse_reply_create");
	if (pk_mount_arg)
		fuse_opt_add_arg(args, pk_mount_arg);
	pk_tables++;
}

#undef fuse_session_new
struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
				      size_t op_size, void *userdata)
{
	struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
				     void *) = real("fuse_session_new");
	struct fuse_lowlevel_ops ops;

	if (!next)
		return NULL;
	fill(&ops, op, op_size, args);
	return session = next(args, &ops, sizeof ops, userdata);
}

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
struct fuse_session *fuse_session_new_versioned(struct fuse_args *args,
						const struct fuse_lowlevel_ops *op, size_t op_size,
						struct libfuse_version *version, void *userdata)
{
	struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
				     struct libfuse_version *, void *) =
		real("fuse_session_new_versioned");
	struct fuse_lowlevel_ops ops;

	if (!next)
		return NULL;
	fill(&ops, op, op_size, args);
	return session = next(args, &ops, sizeof ops, version, userdata);
}
#endif

/* ------------------------------------------------------------------ replies to OPEN and CREATE */

static int32_t backing_of(const struct fuse_file_info *fi)
{
	return fi->fh == pk_backed_fh ? pk_backing_id : 0;
}

/* pyfuse3's calls come here, as that of fuse_session_new did; libfuse writes before it returns. */
int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	int result;

	reply_backing_id = backing_of(fi);
	result = next_reply_open(req, fi);
	reply_backing_id = 0;
	return result;
}

int fuse_reply_create(fuse_req_t req, const struct fuse_entry_param *entry,
		      const struct fuse_file_info *fi)
{
	int result;

	reply_backing_id = backing_of(fi);
	result = next_reply_create(req, entry, fi);
	reply_backing_id = 0;
	return result;
}

/*
 * Puts the backing file into a reply, which ends with struct fuse_open_out.  With these two flags
 * the kernel maps the backing file, and goes on sending reads and writes (fs/fuse/file.c).
 */
static void pass_through(const struct iovec *body)
{
	struct open_out open;
	char *at = (char *)body->iov_base + body->iov_len - sizeof open;

	memcpy(&open, at, sizeof open);
	open.open_flags = FOPEN_DIRECT_IO | FOPEN_PASSTHROUGH;
	open.backing_id = reply_backing_id;
	memcpy(at, &open, sizeof open);
}

/* The mounted session's descriptor of /dev/fuse; -1: there is none. */
int pk_device(void)
{
	return session ? fuse_session_fd(session) : -1;
}

/* ------------------------------------------------------------------ between libfuse and the kernel */

static uint32_t u32_at(const void *body, size_t offset)
{
	uint32_t value;

	memcpy(&value, (const char *)body + offset, sizeof value);
	return value;
}

static void note_request(const struct in_header *in, size_t length)
{
	const void *body = in + 1;

	pk_request.nodeid = in->nodeid;
	pk_request.uid = in->uid;
	pk_request.opcode = in->opcode;
	pk_request.kill = pk_request.tmpfile = 0;
	pk_request.serial++;
	if (length < sizeof *in + 8)
		return;
	switch (in->opcode) {
	case OP_WRITE:
		if (length >= sizeof *in + 24)
			pk_request.kill = !!(u32_at(body, 20) & WRITE_KILL_SUIDGID);
		break;
	case OP_SETATTR:
		pk_request.kill = !!(u32_at(body, 0) & SETATTR_KILL_SUIDGID);
		break;
	case OP_OPEN:
		pk_request.kill = !!(u32_at(body, 4) & OPEN_KILL_SUIDGID);
		break;
	case OP_TMPFILE:
		pk_request.tmpfile = 1;
		/* fallthrough */
	case OP_CREATE:
		if (length >= sizeof *in + 16)
			pk_request.kill = !!(u32_at(body, 12) & OPEN_KILL_SUIDGID);
		break;
	case OP_FALLOCATE: /* no flag for these two; the kernel leaves it to us all the same */
	case OP_COPY_FILE_RANGE:
		pk_request.kill = in->uid != 0;
		break;
	case OP_INIT: {
		struct init_in init = { 0 };

		memcpy(&init, body, length - sizeof *in < sizeof init ? length - sizeof *in : sizeof init);
		pk_negotiated.major = init.major;
		pk_negotiated.minor = init.minor;
		pk_negotiated.offered = init.flags;
		if (init.flags & INIT_EXT)
			pk_negotiated.offered |= (uint64_t)init.flags2 << 32;
		init_unique = in->unique;
		break;
	}
	}
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static struct sx_time sx_time(int64_t ns)
{
	int64_t seconds = ns / 1000000000, rest = ns % 1000000000;

	if (rest < 0) {
		rest += 1000000000;
		seconds--;
	}
	return (struct sx_time){ .seconds = seconds, .ns = (uint32_t)rest };
}

/* libfuse has STATX from 3.18 on only; attributes are the same as those of GETATTR. */
static void answer_statx(int fd, const struct in_header *in)
{
	struct pk_statx from = { 0 };
	int64_t result = pk_on_statx(in->nodeid, &from);
	struct statx_out body = {
		.attr_valid = from.timeout_seconds,
		.mask = STATX_BASIC_STATS_AND_BTIME,
		.blksize = 4096,
		.nlink = from.nlink, .uid = from.uid, .gid = from.gid, .mode = (uint16_t)from.mode,
		.ino = in->nodeid, .size = from.size, .blocks = from.pages * 8,
		.atime = sx_time(from.atime_ns), .btime = sx_time(from.btime_ns),
		.ctime = sx_time(from.ctime_ns), .mtime = sx_time(from.mtime_ns),
		.rdev_major = from.major, .rdev_minor = from.minor,
	};
	struct out_header out = { .len = sizeof out, .unique = in->unique };
	struct iovec iov[2] = { { &out, sizeof out }, { &body, sizeof body } };
	int count = 1;

	if (result) {
		out.error = (int32_t)result;
	} else {
		out.len += sizeof body;
		count = 2;
	}
	/* As for libfuse's own replies: who asked may have been interrupted, or is unmounting. */
	if (writev(fd, iov, count) < 0 && errno != ENOENT)
		fuse_log(FUSE_LOG_ERR, "pkernfs: reply to STATX: %s\n", strerror(errno));
}

static ssize_t io_read(int fd, void *buf, size_t size, void *userdata)
{
	uint64_t deadline = 0;
	ssize_t n;

	(void)userdata;
	while ((n = read(fd, buf, size)) < 0 && errno == EAGAIN) {
		uint64_t now = now_ns();

		if (!deadline)
			deadline = now + pk_spin_ns;
		if (now >= deadline) {
			pk_idle = 1;
			errno = EINTR; /* what pyfuse3 takes for "go round the loop again" */
			return -1;
		}
		sched_yield();
	}
	if (n >= (ssize_t)sizeof(struct in_header)) {
		struct in_header *in = buf;

		note_request(in, n);
		if (in->opcode == OP_TMPFILE) {
			in->opcode = OP_CREATE;
		} else if (in->opcode == OP_STATX) {
			answer_statx(fd, in);
			errno = EINTR; /* go round the loop again */
			return -1;
		}
	}
	return n;
}

static ssize_t io_writev(int fd, struct iovec *iov, int count, void *userdata)
{
	const struct out_header *out = iov[0].iov_base;
	struct init_out init;
	ssize_t n;

	(void)userdata;
	if (init_unique && out->unique == init_unique) {
		init_unique = 0;
		if (!out->error && count == 2 && iov[1].iov_len == sizeof init) {
			uint64_t flags;

			memcpy(&init, iov[1].iov_base, sizeof init);
			flags = init.flags | (uint64_t)init.flags2 << 32;
			flags = (flags & ~pk_unwanted) | (pk_wanted & pk_negotiated.offered);
			if (!(pk_negotiated.offered & INIT_EXT))
				flags &= UINT32_MAX;
			init.flags = (uint32_t)flags;
			init.flags2 = (uint32_t)(flags >> 32);
			if (flags & INIT_PASSTHROUGH)
				init.max_stack_depth = 1; /* files on file systems that are not stacked */
			init.max_background = 64;
			init.congestion_threshold = 48;
			iov[1].iov_base = &init;
			pk_negotiated.granted = flags;
			pk_negotiated.max_write = init.max_write;
			pk_negotiated.max_readahead = init.max_readahead;
		}
		pk_negotiated.done = 1;
	}
	if (reply_backing_id && count == 2 && iov[1].iov_len >= sizeof(struct open_out))
		pass_through(&iov[1]);
	n = writev(fd, iov, count);
	if (n < 0 && errno == ENOENT && out->unique)
		return out->len; /* whoever asked was interrupted, or is unmounting: no error of ours */
	return n;
}

static void keep_message(enum fuse_log_level level, const char *format, va_list arguments)
{
	(void)level;
	vsnprintf(pk_message, sizeof pk_message, format, arguments);
}

/* Takes over the session's reads and writes; 0 or a negative errno. libfuse keeps and closes fd. */
int pk_attach(void)
{
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 13)
	static const struct fuse_custom_io io = { .read = io_read, .writev = io_writev };
	int fd, flags;

	fuse_set_log_func(NULL);
	if (!session)
		return -ENOENT;
	fd = fuse_session_fd(session);
	flags = fcntl(fd, F_GETFL);
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -errno;
	return fuse_session_custom_io(session, &io, fd);
#else
	return -ENOSYS;
#endif
}

/* Forgets the former session, so that one process can mount again, and listens to libfuse. */
void pk_reset(void)
{
	session = NULL;
	init_unique = 0;
	pk_backed_fh = 0;
	pk_backing_id = reply_backing_id = 0;
	pk_message[0] = 0;
	fuse_set_log_func(keep_message); /* said by whoever asked for the mount, in one line */
	pk_idle = pk_tables = 0;
	memset(&pk_negotiated, 0, sizeof pk_negotiated);
	memset(&pk_request, 0, sizeof pk_request);
}
