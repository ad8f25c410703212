// Makes calls of a function go to the version of it that old glibc has, too.
//
// In: the name of a function and the version that it has had since x86-64 began. Out: a hidden definition under that name that
// jumps there, so that the linker does not choose the newest version. Registers and stack stay as they are: no signature is
// needed. Used by the .cpp files beside this one, each in a library that needs what it lists.
#pragma once

#define DEEPEP_OLDER(name, version)               \
  __asm__(".pushsection .text\n"                  \
          ".globl " #name "\n"                    \
          ".hidden " #name "\n"                   \
          ".type " #name ", @function\n"          \
          ".symver older_" #name ", " #name "@GLIBC_" version "\n" \
          #name ":\n"                             \
          "  .cfi_startproc\n"                    \
          "  jmp *older_" #name "@GOTPCREL(%rip)\n" \
          "  .cfi_endproc\n"                      \
          ".size " #name ", . - " #name "\n"      \
          ".popsection\n")
