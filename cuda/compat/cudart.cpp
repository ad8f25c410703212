// What glibc.cpp does, for the functions that only the static CUDA runtime calls: glibc 2.34 has moved them into libc.so.6
// under new version names.
//
// In: calls from libcudart_static.a. Out: the same calls to the versions of libdl.so.2, libpthread.so.0 and librt.so.1, which
// are in libc.so.6 on new systems. The link names these libraries. Callers: none in this repository.

#include <features.h>

#include "older.hpp"

#if defined(__x86_64__) && defined(__GLIBC__)

DEEPEP_OLDER(dlclose, "2.2.5");
DEEPEP_OLDER(dlerror, "2.2.5");
DEEPEP_OLDER(dlmopen, "2.3.4");
DEEPEP_OLDER(dlopen, "2.2.5");
DEEPEP_OLDER(dlsym, "2.2.5");
DEEPEP_OLDER(dlvsym, "2.2.5");

DEEPEP_OLDER(pthread_condattr_setpshared, "2.2.5");
DEEPEP_OLDER(pthread_kill, "2.2.5");
DEEPEP_OLDER(pthread_mutexattr_destroy, "2.2.5");
DEEPEP_OLDER(pthread_mutexattr_init, "2.2.5");
DEEPEP_OLDER(pthread_mutexattr_setpshared, "2.2.5");
DEEPEP_OLDER(pthread_mutexattr_settype, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_destroy, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_init, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_rdlock, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_timedrdlock, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_timedwrlock, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_tryrdlock, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_trywrlock, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_unlock, "2.2.5");
DEEPEP_OLDER(pthread_rwlock_wrlock, "2.2.5");
DEEPEP_OLDER(pthread_rwlockattr_destroy, "2.2.5");
DEEPEP_OLDER(pthread_rwlockattr_init, "2.2.5");
DEEPEP_OLDER(pthread_rwlockattr_setpshared, "2.2.5");
DEEPEP_OLDER(pthread_spin_destroy, "2.2.5");
DEEPEP_OLDER(pthread_spin_init, "2.2.5");
DEEPEP_OLDER(pthread_spin_lock, "2.2.5");
DEEPEP_OLDER(pthread_spin_trylock, "2.2.5");
DEEPEP_OLDER(pthread_spin_unlock, "2.2.5");

DEEPEP_OLDER(sem_destroy, "2.2.5");
DEEPEP_OLDER(sem_init, "2.2.5");
DEEPEP_OLDER(sem_post, "2.2.5");
DEEPEP_OLDER(sem_timedwait, "2.2.5");
DEEPEP_OLDER(sem_trywait, "2.2.5");
DEEPEP_OLDER(sem_wait, "2.2.5");

DEEPEP_OLDER(shm_open, "2.2.5");
DEEPEP_OLDER(shm_unlink, "2.2.5");

#endif
