"""The C of the core, a file for each subject; native.h says what each file offers."""
