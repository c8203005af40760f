# What `cmake --install` puts where, for find_package and pkg-config.
set(package "${CMAKE_INSTALL_LIBDIR}/cmake/rexdeploy")
set(pkgconfig "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
install(TARGETS rexdeploy rexdeploy_image EXPORT rexdeploy
  ARCHIVE COMPONENT rexdeploy_Development
  LIBRARY COMPONENT rexdeploy_Runtime NAMELINK_COMPONENT rexdeploy_Development)
install(TARGETS rexdeploy-run rexdeploy-bench RUNTIME COMPONENT rexdeploy_Programs)
install(DIRECTORY include/rexdeploy "${generated}/rexdeploy"
  DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT rexdeploy_Development)

install(EXPORT rexdeploy NAMESPACE rexdeploy:: FILE rexdeploy-targets.cmake
  DESTINATION "${package}" COMPONENT rexdeploy_Development)
configure_package_config_file(cmake/rexdeploy-config.cmake.in rexdeploy-config.cmake
  INSTALL_DESTINATION "${package}")
write_basic_package_version_file(rexdeploy-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/rexdeploy-config.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/rexdeploy-config-version.cmake"
  DESTINATION "${package}" COMPONENT rexdeploy_Development)

file(RELATIVE_PATH to_prefix "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" "${CMAKE_INSTALL_PREFIX}")
function(describe name description requires libraries)
  if(NOT BUILD_SHARED_LIBS)
    set(definitions -DREXDEPLOY_STATIC_DEFINE)
  endif()
  configure_file(cmake/pkgconfig.pc.in ${name}.pc @ONLY)
  install(FILES "${CMAKE_CURRENT_BINARY_DIR}/${name}.pc"
    DESTINATION "${pkgconfig}" COMPONENT rexdeploy_Development)
endfunction()
if(BUILD_SHARED_LIBS)
  describe(rexdeploy "Runs classifiers of rexdeploy bundles" "" "")
  describe(rexdeploy_image "Decodes JPEG and PNG files for rexdeploy" rexdeploy "")
else()  # what a static library uses is linked with it
  list(TRANSFORM CMAKE_DL_LIBS PREPEND -l OUTPUT_VARIABLE loader)
  describe(rexdeploy "Runs classifiers of rexdeploy bundles" libcrypto "${loader}")
  describe(rexdeploy_image "Decodes JPEG and PNG files for rexdeploy" "rexdeploy libjpeg libpng" "")
endif()
