/*
 * Seccomp user notification, and what a supervisor does on behalf of the thread that it is told of:
 * read its memory, and open files with its permissions instead of our own.
 *
 * Threads: credentials and capabilities are the calling thread's alone, as raw system calls change
 * them; the C library's functions would change those of every thread.
 */
#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <linux/stat.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Of Linux 5.14, 5.19 and 6.6: headers may be older than the kernel. */
#ifndef SECCOMP_ADDFD_FLAG_SEND
#define SECCOMP_ADDFD_FLAG_SEND (1UL << 1)
#endif
#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1UL
#endif

_Static_assert(sizeof(struct pk_notified) == sizeof(struct seccomp_notif), "a notification");
_Static_assert(offsetof(struct pk_notified, number) == offsetof(struct seccomp_notif, data.nr) &&
	       offsetof(struct pk_notified, args) == offsetof(struct seccomp_notif, data.args),
	       "a notification");

/* ---------------------------------------------------------------- the filter */

/* From here on, set-uid programs give this thread and its children no privileges. */
int pk_no_new_privs(void)
{
	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ? -errno : 0;
}

/* Yama, where it restricts tracing: let that process, and its descendants, trace this one. */
void pk_let_trace(int pid)
{
	prctl(PR_SET_PTRACER, pid, 0, 0, 0);	/* EINVAL: there is no Yama */
}

/*
 * Filter the system calls of this thread and of its children.  Returns the listener, which an exec
 * closes, or a negative errno.  A kernel before 5.16 would also slow down each process that has a
 * filter, against Spectre: SPEC_ALLOW keeps it from that.  *waits: a call that the supervisor has
 * received is interrupted by fatal signals only (5.19 and later).
 */
int pk_seccomp_listen(const uint64_t *program, uint16_t n, int *waits)
{
	const struct sock_fprog filter = { n, (struct sock_filter *)program };
	const unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_SPEC_ALLOW;
	long fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
			  flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, &filter);

	*waits = fd >= 0;
	if (fd < 0 && errno == EINVAL)
		fd = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &filter);
	return fd < 0 ? -errno : (int)fd;
}

/* ---------------------------------------------------------------- the listener */

/* Have the caller and us run on one processor in turn (6.6 and later). */
void pk_notify_in_turn(int listener)
{
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
}

/* Wait for a call, which the kernel stores into *call.  0 or a negative errno. */
int pk_notify_receive(int listener, struct pk_notified *call)
{
	memset(call, 0, sizeof(*call));
	return ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, call) ? -errno : 0;
}

int pk_notify_is_valid(int listener, uint64_t id)
{
	return !ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id);
}

/* Let the kernel do the call.  0 or a negative errno. */
int pk_notify_go_on(int listener, uint64_t id)
{
	struct seccomp_notif_resp answer = { .id = id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };

	return ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer) ? -errno : 0;
}

/* Have the call return 0, and the kernel not do it.  0 or a negative errno. */
int pk_notify_done(int listener, uint64_t id)
{
	struct seccomp_notif_resp answer = { .id = id };

	return ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer) ? -errno : 0;
}

/*
 * Have the call return a descriptor of what fd is; flags: O_CLOEXEC or 0.  The caller's number of
 * it, or a negative errno.
 *
 * At once (SECCOMP_ADDFD_FLAG_SEND, 5.14 and later) is for callers that signals interrupt: they keep
 * no descriptor that they do not know of.  But if we are killed before the caller has run, the kernel
 * takes the descriptor back and not the answer, which is then 0 (kernel/seccomp.c, 6.18,
 * seccomp_notify_addfd).  In two steps it may keep a descriptor too many, and nothing worse.
 */
int pk_notify_give(int listener, uint64_t id, int fd, uint32_t flags, int at_once)
{
	struct seccomp_notif_addfd given = { .id = id, .flags = at_once ? SECCOMP_ADDFD_FLAG_SEND : 0,
					     .srcfd = (uint32_t)fd, .newfd_flags = flags };
	struct seccomp_notif_resp answer = { .id = id };
	int number = ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &given);

	answer.val = number;
	if (number < 0 || (!at_once && ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer)))
		return -errno;
	return number;
}

/* ---------------------------------------------------------------- the caller */

/*
 * Copy up to n bytes of another process.  Where its memory ends early, so do they: each page is
 * copied as a whole or not.  Returns how many, or a negative errno.
 */
int64_t pk_read_process(int pid, uint64_t address, uint8_t *out, uint32_t n)
{
	uint32_t first = (uint32_t)(PAGE - address % PAGE);
	struct iovec local = { out, n };
	struct iovec remote[2] = { { (void *)(uintptr_t)address, n < first ? n : first },
				   { (void *)(uintptr_t)(address + first), n < first ? 0 : n - first } };
	ssize_t done = process_vm_readv(pid, &local, 1, remote, remote[1].iov_len ? 2 : 1, 0);

	return done < 0 ? -errno : done;
}

/* What the capabilities of a file system's user are to the kernel (CAP_FS_MASK), in two words. */
#define FS_CAPABILITIES                                                                            \
	((1ull << CAP_CHOWN) | (1ull << CAP_MKNOD) | (1ull << CAP_DAC_OVERRIDE) |                   \
	 (1ull << CAP_DAC_READ_SEARCH) | (1ull << CAP_FOWNER) | (1ull << CAP_FSETID) |              \
	 (1ull << CAP_LINUX_IMMUTABLE) | (1ull << CAP_MAC_OVERRIDE))

#define MAX_GROUPS 65536

struct own {
	uint32_t uid, gid;
	int n_groups;
	gid_t *groups;
	struct __user_cap_data_struct caps[_LINUX_CAPABILITY_U32S_3];
};

static struct __user_cap_header_struct version_3 = { _LINUX_CAPABILITY_VERSION_3, 0 };

/* Whether our own credentials may be changed, and so come back: no abort() for want of a right. */
static int may_change(const struct own *own)
{
	const uint64_t needed = (1ull << CAP_SETUID) | (1ull << CAP_SETGID);

	return (own->caps[0].effective & needed) == needed &&
	       !syscall(SYS_setgroups, own->n_groups, own->groups);
}

static int set_ids(uint32_t uid, uint32_t gid, int n_groups, const gid_t *groups)
{
	/* setfsuid and setfsgid return what was before, whether they change it or not. */
	if (syscall(SYS_setgroups, n_groups, groups) ||
	    (syscall(SYS_setfsgid, gid), (uint32_t)syscall(SYS_setfsgid, -1) != gid) ||
	    (syscall(SYS_setfsuid, uid), (uint32_t)syscall(SYS_setfsuid, -1) != uid))
		return -EPERM;
	return 0;
}

static void be_ourselves(struct own *own)
{
	int failed = set_ids(own->uid, own->gid, own->n_groups, own->groups) ||
		     syscall(SYS_capset, &version_3, own->caps);

	free(own->groups);
	if (failed)
		abort();	/* whatever this thread did next, it would do as somebody else */
}

/* Be the caller to file systems.  0, or a negative errno if that is not for us. */
static int be_caller(const struct pk_caller *who, struct own *own)
{
	struct __user_cap_data_struct caps[_LINUX_CAPABILITY_U32S_3];

	own->uid = (uint32_t)syscall(SYS_setfsuid, -1);
	own->gid = (uint32_t)syscall(SYS_setfsgid, -1);
	own->groups = malloc(MAX_GROUPS * sizeof(gid_t));
	own->n_groups = own->groups ? (int)syscall(SYS_getgroups, MAX_GROUPS, own->groups) : -1;
	if (own->n_groups < 0 || syscall(SYS_capget, &version_3, own->caps) || !may_change(own)) {
		free(own->groups);
		return -EPERM;
	}
	memcpy(caps, own->caps, sizeof(caps));
	for (int i = 0; i < _LINUX_CAPABILITY_U32S_3; i++)
		caps[i].effective &= ~(uint32_t)((FS_CAPABILITIES & ~who->capabilities) >> 32 * i);
	if (set_ids(who->uid, who->gid, (int)who->n_groups, who->groups) ||
	    syscall(SYS_capset, &version_3, caps)) {
		be_ourselves(own);
		return -EPERM;
	}
	return 0;
}

/* openat2(2), with the caller's permissions; who NULL: with our own.  A descriptor or a negative errno. */
int pk_open(const struct pk_caller *who, int directory, const char *path, uint64_t flags,
	    uint64_t resolve)
{
	struct open_how how = { .flags = flags | O_CLOEXEC, .resolve = resolve };
	struct own own;
	int fd, error = who ? be_caller(who, &own) : 0;

	if (error)
		return error;
	fd = (int)syscall(SYS_openat2, directory, path, &how, sizeof(how));
	if (fd < 0)
		fd = -errno;
	if (who)
		be_ourselves(&own);
	return fd;
}

/* Whether the caller may read, write what fd is (R_OK, W_OK), also by its mount.  0 or a negative errno. */
int pk_may_access(const struct pk_caller *who, int fd, int mode)
{
	struct own own;
	int error = who ? be_caller(who, &own) : 0;

	if (error)
		return error;
	if (syscall(SYS_faccessat2, fd, "", mode, AT_EMPTY_PATH | AT_EACCESS))
		error = -errno;
	if (who)
		be_ourselves(&own);
	return error;
}

/* Where a path leads: the mount, and the file in it.  0 or a negative errno. */
int pk_place_of(const char *path, struct pk_place *place)
{
	struct statx s;

	if (syscall(SYS_statx, AT_FDCWD, path, AT_STATX_DONT_SYNC, STATX_INO | STATX_MNT_ID, &s))
		return -errno;
	place->mount = s.stx_mnt_id;
	place->ino = s.stx_ino;
	place->device = (uint64_t)s.stx_dev_major << 32 | s.stx_dev_minor;
	return 0;
}
